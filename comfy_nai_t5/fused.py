"""Joined products on the modules of a ComfyUI T5, wherever that changes nothing.

The weights of q, k and v become slices of one tensor, and so do those of gate and up, so that each group is one matrix
product. They stay parameters of ComfyUI's own modules: what it patches, hooks, merges, saves or moves is still q, k or
v, and a patch of a slice is a patch of the joined tensor. Where it puts another tensor in place of a slice, the next
call joins anew. A layer that cannot be joined at this moment runs module by module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nai_t5_core.attention import Attend
from nai_t5_core.encoder import EncoderBlock
from nai_t5_core.layers import ACTIVATIONS, GatedFeedForward, add_sublayer, gated, scaled


@dataclass(frozen=True)
class FusedWeights:
    """One layer's weights in the compute dtype: qkv [3 · inner, d_model], gate and up (or ReLU's only one) in wi."""

    attention_norm: Tensor
    qkv: Tensor
    o: Tensor
    dense_norm: Tensor
    wi: Tensor
    wo: Tensor


class SharedBlock(EncoderBlock):
    """A layer on ComfyUI's modules, which runs on ``weights`` while it is given some."""

    weights: FusedWeights | None = None

    def forward(self, residual: Tensor, attend: Attend, dtype: torch.dtype) -> Tensor:
        if self.weights is None:
            return super().forward(residual, attend, dtype)
        residual = self._attention(self.weights, residual, attend, dtype)
        return self._feed_forward(self.weights, residual, dtype)

    def _attention(self, weights: FusedWeights, residual: Tensor, attend: Attend, dtype: torch.dtype) -> Tensor:
        layer: Any = self.layer[0]
        attention = layer.SelfAttention
        hidden = _norm(residual, weights.attention_norm, layer.layer_norm, dtype)
        q, k, v = F.linear(hidden, weights.qkv).unflatten(-1, (3, attention.heads, attention.d_kv)).unbind(-3)
        out = F.linear(scaled(attend(q, k, v).flatten(-2), attention.scale), weights.o)
        return add_sublayer(residual, out, layer.out_scale)

    def _feed_forward(self, weights: FusedWeights, residual: Tensor, dtype: torch.dtype) -> Tensor:
        layer: Any = self.layer[-1]
        dense = layer.DenseReluDense
        hidden = _norm(residual, weights.dense_norm, layer.layer_norm, dtype)
        if not isinstance(dense, GatedFeedForward):
            inner = ACTIVATIONS[dense.activation](F.linear(scaled(hidden, dense.scale), weights.wi))
        elif dense.scale == 1:
            inner = gated(*F.linear(hidden, weights.wi).chunk(2, dim=-1), dense.activation)
        else:
            # Only up is scaled, and before its product, which might overflow: so these two are taken apart.
            gate, up = weights.wi.chunk(2)
            inner = gated(F.linear(hidden, gate), F.linear(hidden * dense.scale, up), dense.activation)
        return add_sublayer(residual, F.linear(inner, weights.wo), layer.out_scale)


def _norm(residual: Tensor, weight: Tensor, norm: Any, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(residual, residual.shape[-1:], weight.to(residual.dtype), norm.variance_epsilon).to(dtype)


def fuse(block: Any) -> FusedWeights:
    """The weights of a layer, joined, for which there must be no :func:`obstacle`."""
    attention, dense = block.layer[0].SelfAttention, block.layer[-1].DenseReluDense
    inner = (dense.wi_0, dense.wi_1) if isinstance(dense, GatedFeedForward) else (dense.wi,)
    return FusedWeights(
        attention_norm=block.layer[0].layer_norm.weight,
        qkv=_joined([attention.q, attention.k, attention.v]),
        o=attention.o.weight,
        dense_norm=block.layer[-1].layer_norm.weight,
        wi=_joined(inner),
        wo=dense.wo.weight,
    )


def obstacle(block: Any, dtype: torch.dtype, device: torch.device | None = None) -> str | None:
    """Why a layer cannot be joined at this moment, as the end of a sentence; None if it can.

    ``device`` is where it is to run; None where that is not to be considered, since the weights are not there yet.
    """
    for name, module in block.named_modules():
        if next(module.children(), None) is not None or name.endswith("relative_attention_bias"):
            continue
        if _has_hooks(module):
            return "other software has hooked into its modules"
        if not name.endswith("layer_norm") and (reason := _not_plain(module)):
            return reason
        weight = module.weight
        if device is not None and weight.device != device:
            return f"its weights come from {weight.device} to {device} at every call"
        if weight.dtype != dtype and not name.endswith("layer_norm"):
            return f"its weights are kept in {_short(weight.dtype)} and cast to {_short(dtype)} at every call"
    return None


def _not_plain(linear: Any) -> str | None:
    """Why a module's call is more than a product with the weight that lies there; None if it is no more."""
    if getattr(type(linear), "forward", None) is not comfy.ops.disable_weight_init.Linear.forward:
        return f"its weights are in modules of another kind ({type(linear).__name__})"
    if hasattr(linear, "_v"):
        return "ComfyUI streams its weights (dynamic memory)"
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
