"""An encoder block computed by the kernels for AVX512: from the modules' own weights, or from packed copies.

In bfloat16 less is rounded than where torch computes the block: activation and gating are applied to float32 sums, and
what is added to the residual is not rounded before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.facts.config import Activation
from nai_t5_core.kernels.build import why_not_kernels
from nai_t5_core.kernels.calls import (
    ACTIVATION_NUMBERS,
    COMPUTE_DTYPES,
    KernelWeight,
    add_product,
    encode_block,
    normed_product,
)
from nai_t5_core.model.attention import Attend, DocumentLayer, FusedSelfAttention
from nai_t5_core.model.layers import CastingOps, FeedForward, FoldedRMSNorm, FusedGatedFeedForward, NoInit

# Not their subclasses, which do more than a product (adapters, quantisation, offloading).
PLAIN_LINEARS = (nn.Linear, NoInit.Linear)
# Those whose call is a product where the weight is in the compute dtype.
PRODUCTS = (*PLAIN_LINEARS, CastingOps.Linear)


@dataclass(frozen=True)
class KernelBlock:
    """A block's products.

    ``weights`` are those of qkv, o, the feed-forward's first, gated or not, and wo. They are read where they lie, so
    that a block of plain weights sees every change that is made to them.
    """

    weights: tuple[KernelWeight, KernelWeight, KernelWeight, KernelWeight]
    activation: Activation
    heads: int
    epsilon: float

    @classmethod
    def of(
        cls,
        weights: Sequence[Tensor],
        dtype: torch.dtype,
        dense: Any,
        heads: int,
        epsilon: float,
        scales: Sequence[Tensor | None] = (None,) * 4,
    ) -> KernelBlock:
        """From the weights of qkv, o, wi and wo, [out_features, in_features]; q, k, v and gate, up one above the other.

        ``dtype`` is that of the activations, ``dense`` the feed-forward module that says which activation there is.
        Weights in int8 have ``scales``, and must be packed.
        """
        is_gated = (False, False, not isinstance(dense, FeedForward), False)
        qkv, o, inner, wo = map(KernelWeight.plain, weights, (dtype,) * 4, is_gated, scales)
        return cls((qkv, o, inner, wo), dense.activation, heads, epsilon)

    def packed(self) -> KernelBlock:
        """The same on copies in panels, for which nothing is rearranged in every call."""
        qkv, o, inner, wo = map(KernelWeight.packed, self.weights)
        return replace(self, weights=(qkv, o, inner, wo))

    def __call__(
        self, residual: Tensor, attend: Attend, attention_norm: Tensor | None = None, dense_norm: Tensor | None = None
    ) -> Tensor:
        """The residual [tokens, d_model], float32, changed in place. Norm weights are [d_model] in float32."""
        if isinstance(attend, DocumentLayer) and (documents := attend.plan.documents) is not None:
            norms, table, scale = (attention_norm, dense_norm), attend.exact_table, attend.plan.scale
            numbers = (self.heads, self.epsilon, self.activation)
            encode_block(residual, self.weights, norms, *numbers, documents, table, scale)
            return residual
        qkv, o, inner, wo = self.weights
        projected = normed_product(residual, attention_norm, self.epsilon, qkv)
        q, k, v = projected.unflatten(-1, (3, self.heads, -1)).unbind(-3)
        add_product(attend(q, k, v).flatten(-2).contiguous(), o, residual)
        hidden = normed_product(residual, dense_norm, self.epsilon, inner, self.activation)
        add_product(hidden, wo, residual)
        return residual


# ---------------------------------------------------------------------------------------------------------------------
# Whether the kernels compute a block
# ---------------------------------------------------------------------------------------------------------------------


def kernels_of(block: Any, dtype: torch.dtype) -> KernelBlock | None:
    """The kernels on the weights of a block in the fused layout, as these are now; None where torch computes it.

    They may still have to be built, see :func:`nai_t5_core.kernels.build.prepare_kernels`.
    """
    if dtype not in COMPUTE_DTYPES or torch_is_needed():
        return None
    attention_layer, feed_forward_layer = block.layer
    attends, dense = attention_layer.SelfAttention, feed_forward_layer.DenseReluDense
    if not isinstance(attends, FusedSelfAttention) or type(dense) not in (FusedGatedFeedForward, FeedForward):
        return None
    linears = (attends.qkv, attends.o, dense.wi, dense.wo)
    if not all(type(linear) in PRODUCTS and _is_usable(linear.weight, dtype) for linear in linears):
        return None
    # A norm that has a weight of its own, as live LoRAs give it, is another one than the kernels compute here.
    if not all(type(layer.layer_norm) is FoldedRMSNorm for layer in block.layer):
        return None
    if not is_supported(block) or is_watched(block.modules()) or why_not_kernels() is not None:
        return None
    weights = [linear.weight for linear in linears]
    return KernelBlock.of(weights, dtype, dense, attends.heads, attention_layer.layer_norm.eps)


def is_supported(block: Any) -> bool:
    """Whether the kernels know all that this block does: its activation, and that nothing is scaled or of odd size."""
    attention_layer, feed_forward_layer = block.layer
    attends, dense = attention_layer.SelfAttention, feed_forward_layer.DenseReluDense
    scales = [layer.out_scale for layer in block.layer] + [getattr(module, "scale", 1) for module in (attends, dense)]
    is_known = dense.activation in ACTIVATION_NUMBERS and attends.d_kv % 2 == 0
    return is_known and all(scale == 1 for scale in scales)


def is_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether other software wants to know of calls of these modules, or has put its own in place of their calls."""
    return any(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__ for module in modules)


def torch_is_needed() -> bool:
    """Whether operations must be torch's now: gradients are recorded, a compiler traces them, or a mode counts them."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _is_usable(weight: Tensor, dtype: torch.dtype) -> bool:
    return (
        type(weight) is nn.Parameter
        and weight.dtype == dtype
        and weight.is_cpu
        and weight.is_contiguous()
        and weight.shape[1] % 2 == 0
    )
