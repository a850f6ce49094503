"""Joined products on the modules of a ComfyUI T5, wherever that changes nothing.

The weights of q, k and v become slices of one tensor, and so do those of gate and up, so that each group is one matrix
product. They stay parameters of ComfyUI's own modules: what it patches, hooks, merges, saves or moves is still q, k or
v, and a patch of a slice is a patch of the joined tensor. Where it puts another tensor in place of a slice, the next
call joins anew. A layer that cannot be joined at this moment runs module by module.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfy_nai_t5.quantised import Quantised
from nai_t5_core.backends.kernels.block import KernelBlock
from nai_t5_core.backends.kernels.build import better_than_kernels
from nai_t5_core.backends.kernels.runners import KernelsBackend
from nai_t5_core.model.attention import Attend
from nai_t5_core.model.block import Block, Lending
from nai_t5_core.model.layers import ACTIVATIONS, GatedFeedForward, add_sublayer, gated, scaled

# Why a layer is not joined while ComfyUI brings its weights in as they are used.
STREAMED = "ComfyUI streams its weights (dynamic memory)"
# Why a layer is not joined whose weights are those of a quantised file.
QUANTISED = "its weights stay quantised"


class Products(Protocol):
    """The matrix products of one layer."""

    def qkv(self, hidden: Tensor) -> Tensor:
        """[tokens, d_model] to queries, keys and values side by side: [tokens, 3 · inner]."""
        ...

    def o(self, attended: Tensor) -> Tensor:
        """[tokens, inner] to [tokens, d_model]."""
        ...

    def feed_forward(self, hidden: Tensor, dense: Any) -> Tensor:
        """[tokens, d_model] to [tokens, d_model], as the module ``dense`` does."""
        ...


@dataclass(frozen=True)
class Norms:
    """The weights of a layer's norms."""

    attention_norm: Tensor
    dense_norm: Tensor


@dataclass(frozen=True)
class FusedWeights(Norms):
    """One layer's weights in the compute dtype: qkv [3 · inner, d_model], gate and up (or ReLU's only one) in wi."""

    qkv: Tensor
    o: Tensor
    wi: Tensor
    wo: Tensor

    @property
    def products(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Those of qkv, o, wi and wo."""
        return self.qkv, self.o, self.wi, self.wo

    def cast(self, dtype: torch.dtype, but: Collection[torch.dtype] = ()) -> FusedWeights:
        """The same in ``dtype``; norms, and weights in one of the dtypes ``but``, as they are."""
        weights = {name: getattr(self, name).detach() for name in ("qkv", "o", "wi", "wo")}
        return replace(self, **{name: x if x.dtype in but else x.to(dtype) for name, x in weights.items()})


@dataclass(frozen=True)
class FusedProducts:
    """Products with the joined weights as they lie in memory."""

    weights: FusedWeights

    def qkv(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weights.qkv)

    def o(self, attended: Tensor) -> Tensor:
        return F.linear(attended, self.weights.o)

    def feed_forward(self, hidden: Tensor, dense: Any) -> Tensor:
        wi = self.weights.wi
        if not isinstance(dense, GatedFeedForward):
            inner = ACTIVATIONS[dense.activation](F.linear(scaled(hidden, dense.scale), wi))
        elif dense.scale == 1:
            gate, up = F.linear(hidden, wi).chunk(2, dim=-1)
            inner = gated(gate, up, dense.activation)
        else:
            # Only up is scaled, and before its product, which might overflow: so these two are taken apart.
            gate_rows, up_rows = wi.chunk(2)
            inner = gated(F.linear(hidden, gate_rows), F.linear(hidden * dense.scale, up_rows), dense.activation)
        return F.linear(inner, self.weights.wo)


class JoinedKernels:
    """Runs a layer by the kernels on its joined weights, for the time of a call."""

    name = "joined, by the kernels"
    lending: Lending | None = None

    def __init__(self, norms: Norms, kernels: KernelBlock) -> None:
        self.norms = (norms.attention_norm, norms.dense_norm)
        self.kernels = kernels

    def __call__(self, block: Block, residual: Tensor, attend: Attend, dtype: torch.dtype) -> Tensor:
        return self.kernels(residual, attend, *(_aligned(norm.detach().to(residual.dtype)) for norm in self.norms))

    def attends(self, block: Block, dtype: torch.dtype) -> bool:
        return True


def _aligned(norm: Tensor) -> Tensor:
    """A norm's weight that begins where a number may; in a file that is mapped, it may begin within one."""
    return norm.clone() if norm.data_ptr() % norm.dtype.itemsize else norm


class JoinedProducts:
    """Runs a layer by joined products, for the time of a call."""

    name = "joined"
    lending: Lending | None = None

    def __init__(self, weights: FusedWeights, products: Products) -> None:
        self.weights, self.products = weights, products

    def __call__(self, block: Block, residual: Tensor, attend: Attend, dtype: torch.dtype) -> Tensor:
        attention: Any = block.layer[0]
        dense: Any = block.layer[-1]
        hidden = _norm(residual, self.weights.attention_norm, attention.layer_norm, dtype)
        residual = add_sublayer(residual, self._attention(attention.SelfAttention, hidden, attend), attention.out_scale)
        hidden = _norm(residual, self.weights.dense_norm, dense.layer_norm, dtype)
        return add_sublayer(residual, self.products.feed_forward(hidden, dense.DenseReluDense), dense.out_scale)

    def _attention(self, module: Any, hidden: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.products.qkv(hidden).unflatten(-1, (3, module.heads, module.d_kv)).unbind(-3)
        return self.products.o(scaled(attend(q, k, v).flatten(-2), module.scale))

    def attends(self, block: Block, dtype: torch.dtype) -> bool:
        return False


def _norm(residual: Tensor, weight: Tensor, norm: Any, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(residual, residual.shape[-1:], weight.to(residual.dtype), norm.variance_epsilon).to(dtype)


def fuse(block: Any) -> FusedWeights:
    """The weights of a layer, joined, for which there must be no :func:`refuses`."""
    q, k, v, o, *inner, wo = projections(block)
    return FusedWeights(
        attention_norm=block.layer[0].layer_norm.weight,
        qkv=_joined([q, k, v]),
        o=o.weight,
        dense_norm=block.layer[-1].layer_norm.weight,
        wi=_joined(inner),
        wo=wo.weight,
    )


def takes_kernels(device: torch.device, dtype: torch.dtype, kernels: KernelsBackend) -> bool:
    """Whether these kernels compute joined products in ``dtype``, as far as is known before they are built."""
    return kernels.missing(device, dtype) is None and better_than_kernels() is None


def kernels_on(
    block: Any, products: Sequence[Tensor], dtype: torch.dtype, scales: Sequence[Tensor | None] = (None,) * 4
) -> KernelBlock:
    """The kernels on a layer's joined weights of qkv, o, wi and wo, computing in ``dtype``; on bytes with scales."""
    attention, dense = block.layer[0], block.layer[-1].DenseReluDense
    heads, epsilon = attention.SelfAttention.heads, attention.layer_norm.variance_epsilon
    return KernelBlock.of(products, dtype, dense, heads, epsilon, scales)


def refuses(
    block: Any, dtype: torch.dtype, others: Collection[torch.dtype], device: torch.device | None = None
) -> str | None:
    """Why a layer cannot be joined at this moment, as the end of a sentence; None if it can.

    ``dtype`` is what it computes in, and ``others`` the dtypes of weights that are cast for it without ado. ``device``
    is where it is to run; None where that is not to be considered, since the weights are not there yet.
    """
    norms = [layer.layer_norm for layer in (block.layer[0], block.layer[-1])]
    linears = projections(block)
    if any(map(_has_hooks, (*norms, *linears))):
        return "other software has hooked into its modules"
    for linear in linears:
        if reason := not_plain(linear):
            return reason
    for module in (*norms, *linears):
        if device is not None and module.weight.device != device:
            return f"its weights come from {module.weight.device} to {device} at every call"
    for linear in linears:
        if linear.weight.dtype != dtype and linear.weight.dtype not in others:
            return f"its weights are kept in {_short(linear.weight.dtype)} and cast to {_short(dtype)} at every call"
    for group in (linears[:3], linears[4:-1]):
        if len({linear.weight.dtype for linear in group}) > 1:
            return "weights to be joined are of different dtypes"
    return None


def projections(block: Any) -> list[Any]:
    """The modules of a layer's matrix products."""
    attention, dense = block.layer[0].SelfAttention, block.layer[-1].DenseReluDense
    inner = (dense.wi_0, dense.wi_1) if isinstance(dense, GatedFeedForward) else (dense.wi,)
    return [attention.q, attention.k, attention.v, attention.o, *inner, dense.wo]


def not_plain(linear: Any) -> str | None:
    """Why a module's call is more than a product with the weight that lies there; None if it is no more."""
    if isinstance(linear, Quantised):
        return QUANTISED
    plain, own = comfy.ops.disable_weight_init.Linear, type(linear)
    if getattr(own, "forward", None) is not plain.forward:
        return f"its weights are in modules of another kind ({own.__name__})"
    if own.forward_comfy_cast_weights is not plain.forward_comfy_cast_weights:
        return "ComfyUI makes numbers of its quantised weights at every call"
    if hasattr(linear, "_v"):
        return STREAMED
    if linear.weight_function:
        return "its weights are patched at every call (partial loading)"
    if type(linear.weight) is not nn.Parameter or linear.weight.is_meta or not linear.weight.is_contiguous():
        return "its weights are no plain tensors"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _joined(linears: Sequence[Any]) -> Tensor:
    """The weights of these modules, one above the other, of which they are slices from now on."""
    weights = [linear.weight for linear in linears]
    rows = sum(len(weight) for weight in weights)
    if not _are_consecutive(weights):
        # Outside inference mode: hooks change weights in place, and may do so outside of it.
        with torch.inference_mode(False), torch.no_grad():
            together = torch.cat([weight.detach() for weight in weights])
            for linear, part in zip(linears, together.split([len(weight) for weight in weights]), strict=True):
                linear.weight = nn.Parameter(part, requires_grad=False)
        return together
    first = weights[0].detach()
    return first.as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())


def _are_consecutive(weights: Sequence[Tensor]) -> bool:
    start = weights[0].data_ptr()
    storage = weights[0].untyped_storage().data_ptr()
    for weight in weights:
        if weight.untyped_storage().data_ptr() != storage or weight.data_ptr() != start:
            return False
        start += weight.nbytes
    return True
