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

from comfy_nai_t5.pages import can_lie_side_by_side, lie_side_by_side
from comfy_nai_t5.quantised import Quantised
from nai_t5_core.backends.kernels.block import KernelBlock
from nai_t5_core.backends.kernels.build import better_than_kernels
from nai_t5_core.backends.kernels.runners import KernelsBackend
from nai_t5_core.model.attention import Attend
from nai_t5_core.model.block import Block, Lending
from nai_t5_core.model.layers import ACTIVATIONS, GatedFeedForward, add_sublayer, gated, scaled

# Why a layer is not joined while ComfyUI brings its weights in as they are used, and where it would do so.
APART = "its weights cannot lie side by side in ComfyUI's dynamic memory"
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
class FusedWeights:
    """One layer's weights in the compute dtype: qkv [3 · inner, d_model], gate and up (or ReLU's only one) in wi.

    The norms are those before attention and before the feed-forward.
    """

    norms: tuple[Tensor, Tensor]
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

    def wi(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weights.wi)

    def wo(self, inner: Tensor) -> Tensor:
        return F.linear(inner, self.weights.wo)

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
        return self.wo(inner)


class JoinedKernels:
    """Runs a layer by the kernels on its joined weights, for the time of a call."""

    name = "joined, by the kernels"
    lending: Lending | None = None

    def __init__(self, norms: tuple[Tensor, Tensor], kernels: KernelBlock) -> None:
        self.norms, self.kernels = norms, kernels

    def __call__(self, block: Block, residual: Tensor, attend: Attend, dtype: torch.dtype) -> Tensor:
        return self.kernels(residual, attend, *(_aligned(norm.detach().to(residual.dtype)) for norm in self.norms))

    def attends(self, block: Block, dtype: torch.dtype) -> bool:
        return True

    def forget(self) -> None:
        """Nothing: it is made for one call."""


def _aligned(norm: Tensor) -> Tensor:
    """A norm's weight that begins where a number may; in a file that is mapped, it may begin within one."""
    return norm.clone() if norm.data_ptr() % norm.dtype.itemsize else norm


class JoinedProducts:
    """Runs a layer by joined products, for the time of a call."""

    name = "joined"
    lending: Lending | None = None

    def __init__(self, norms: tuple[Tensor, Tensor], products: Products) -> None:
        self.norms, self.products = norms, products

    def __call__(self, block: Block, residual: Tensor, attend: Attend, dtype: torch.dtype) -> Tensor:
        attention: Any = block.layer[0]
        dense: Any = block.layer[-1]
        attention_norm, dense_norm = self.norms
        hidden = _norm(residual, attention_norm, attention.layer_norm, dtype)
        residual = add_sublayer(residual, self._attention(attention.SelfAttention, hidden, attend), attention.out_scale)
        hidden = _norm(residual, dense_norm, dense.layer_norm, dtype)
        return add_sublayer(residual, self.products.feed_forward(hidden, dense.DenseReluDense), dense.out_scale)

    def _attention(self, module: Any, hidden: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.products.qkv(hidden).unflatten(-1, (3, module.heads, module.d_kv)).unbind(-3)
        return self.products.o(scaled(attend(q, k, v).flatten(-2), module.scale))

    def attends(self, block: Block, dtype: torch.dtype) -> bool:
        return False

    def forget(self) -> None:
        """Nothing: it is made for one call."""


def _norm(residual: Tensor, weight: Tensor, norm: Any, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(residual, residual.shape[-1:], weight.to(residual.dtype), norm.variance_epsilon).to(dtype)


def fuse(block: Any) -> FusedWeights:
    """The weights of a layer, joined, for which there must be no :func:`refuses`."""
    q, k, v, o, *inner, wo = projections(block)
    return FusedWeights(
        norms=norm_weights(block),
        qkv=_joined([q, k, v]),
        o=o.weight,
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
    norms, linears = norms_of(block), projections(block)
    if reason := _not_called_as_they_are(norms, linears):
        return reason
    for linear in linears:
        if reason := no_plain_tensor(linear):
            return reason
    for module in (*norms, *linears):
        if device is not None and module.weight.device != device:
            return f"its weights come from {module.weight.device} to {device} at every call"
    for linear in linears:
        if linear.weight.dtype != dtype and linear.weight.dtype not in others:
            return f"its weights are kept in {_short(linear.weight.dtype)} and cast to {_short(dtype)} at every call"
    for group in _grouped(linears):
        if len({linear.weight.dtype for linear in group}) > 1:
            return "weights to be joined are of different dtypes"
    return None


def is_streamed(block: Any) -> bool:
    """Whether weights of a layer have places in newer ComfyUI's dynamic memory, which brings them in as it likes."""
    return any("_v" in vars(linear) for linear in projections(block))


def refuses_streamed(block: Any, device: torch.device | None = None) -> str | None:
    """As :func:`refuses`, of a layer in ComfyUI's dynamic memory; without a ``device``, of one that will be there."""
    norms, linears = norms_of(block), projections(block)
    if reason := _not_called_as_they_are(norms, linears):
        return reason
    together = _grouped(linears)
    if not all(map(can_lie_side_by_side if device is None else lie_side_by_side, together)):
        return APART
    for norm in norms:
        if device is not None and norm.weight.device != device:
            return f"its weights come from {norm.weight.device} to {device} at every call"
    if device is not None and any(linear.weight.device == device for group in together for linear in group):
        return f"ComfyUI's dynamic memory is not for {device}"
    return None


def norms_of(block: Any) -> list[Any]:
    """The norms before attention and before the feed-forward."""
    return [block.layer[0].layer_norm, block.layer[-1].layer_norm]


def norm_weights(block: Any) -> tuple[Tensor, Tensor]:
    """Those of :func:`norms_of`; of float8, which not every card reads, in float32."""
    attention, dense = (norm.weight.detach() for norm in norms_of(block))
    return (attention, dense) if attention.dtype.itemsize > 1 else (attention.float(), dense.float())


def has_plain_norms(block: Any, device: torch.device) -> bool:
    """Whether the norms are no more than their weights, which lie on the device."""
    return not any(_has_hooks(norm) or norm.weight.device != device for norm in norms_of(block))


def is_plain_table(embedding: Any, device: torch.device) -> bool:
    """Whether an embedding's rows are what lies in its weight on the device."""
    plain, own = comfy.ops.disable_weight_init.Embedding, type(embedding)
    does_no_more = own.forward is plain.forward and own.forward_comfy_cast_weights is plain.forward_comfy_cast_weights
    weight = embedding.weight
    is_here = isinstance(weight, nn.Parameter) and weight.device == device and weight.dtype.itemsize > 1
    return does_no_more and is_here and not embedding.weight_function and not _has_hooks(embedding)


def groups(block: Any) -> list[list[Any]]:
    """The modules whose products can be one: q, k and v, and gate and up where there are two."""
    return _grouped(projections(block))


def _grouped(linears: Sequence[Any]) -> list[list[Any]]:
    q, k, v, _, *inner, _ = linears
    return [[q, k, v], inner] if len(inner) > 1 else [[q, k, v]]


def projections(block: Any) -> list[Any]:
    """The modules of a layer's matrix products."""
    attention, dense = block.layer[0].SelfAttention, block.layer[-1].DenseReluDense
    inner = (dense.wi_0, dense.wi_1) if isinstance(dense, GatedFeedForward) else (dense.wi,)
    return [attention.q, attention.k, attention.v, attention.o, *inner, dense.wo]


def _not_called_as_they_are(norms: Sequence[Any], linears: Sequence[Any]) -> str | None:
    """Why the modules of a layer do more than they are known to do; None if they do no more."""
    if any(map(_has_hooks, (*norms, *linears))):
        return "other software has hooked into its modules"
    return next((reason for linear in linears if (reason := not_plain(linear))), None)


def not_plain(linear: Any) -> str | None:
    """Why a module's call is more than a product with the weight that lies there; None if it is no more."""
    if isinstance(linear, Quantised):
        return QUANTISED
    plain, own = comfy.ops.disable_weight_init.Linear, type(linear)
    if getattr(own, "forward", None) is not plain.forward:
        return f"its weights are in modules of another kind ({own.__name__})"
    if own.forward_comfy_cast_weights is not plain.forward_comfy_cast_weights:
        return "ComfyUI makes numbers of its quantised weights at every call"
    if linear.weight_function:
        return "its weights are patched at every call (partial loading)"
    return None


def no_plain_tensor(linear: Any) -> str | None:
    """Why a module's weight cannot be read as it lies; None if it can."""
    is_plain = type(linear.weight) is nn.Parameter and not linear.weight.is_meta and linear.weight.is_contiguous()
    return None if is_plain else "its weights are no plain tensors"


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
