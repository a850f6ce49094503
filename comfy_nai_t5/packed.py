"""A layer's products with weights in oneDNN's own order, for a T5 on the CPU. They are a second copy, and faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from comfy_nai_t5.fused import FusedWeights, projections
from nai_t5_core.layers import GatedFeedForward
from nai_t5_core.optimize import PackedFeedForward, PackedGatedFeedForward, PackedLinear


class PackedProducts:
    """The products of one layer in ``dtype``, made of the weights that it has now. Each is packed by its second call.

    What ComfyUI patches are the originals, so these serve while the originals are the same parameters with the same
    values. Of values that are changed behind torch's back they know nothing: see ``SharedStack.is_hooked``.
    """

    def __init__(self, block: Any, weights: FusedWeights, dtype: torch.dtype) -> None:
        self._made_of = _originals(block)
        dense = block.layer[-1].DenseReluDense
        qkv, o, wi, wo = (weight.detach().to(dtype) for weight in (weights.qkv, weights.o, weights.wi, weights.wo))
        self.qkv, self.o = PackedLinear(qkv), PackedLinear(o)
        self.dense: nn.Module
        if isinstance(dense, GatedFeedForward):
            gate, up = wi.chunk(2)
            self.dense = PackedGatedFeedForward(gate, up, wo, dense.activation, dense.scale)
        else:
            self.dense = PackedFeedForward(wi, wo, dense.activation, dense.scale)

    def is_made_of(self, block: Any) -> bool:
        """Whether the layer still has the weights that these products were made of."""
        now = _originals(block)
        return all(
            weight is old and version == old_version
            for (weight, version), (old, old_version) in zip(now, self._made_of, strict=True)
        )

    def feed_forward(self, hidden: Tensor, _: nn.Module) -> Tensor:
        out: Tensor = self.dense(hidden)
        return out


def _originals(block: Any) -> list[tuple[Tensor, int]]:
    """The weights of a layer's projections, and how often each was changed in place."""
    weights = [linear.weight for linear in projections(block)]
    return [(weight, 0 if weight.is_inference() else weight._version) for weight in weights]
