"""A layer's products in 8 bits, for a T5 on the CPU. They are a second copy of the weights, and the smallest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from comfy_nai_t5.fused import FusedWeights, JoinedKernels, JoinedProducts, kernels_on
from comfy_nai_t5.packed import Kept
from nai_t5_core.backends.int8_weight import Int8Product, Int8Weight
from nai_t5_core.model.layers import ACTIVATIONS, GatedFeedForward, gated, scaled


class Int8Kernels(Kept):
    """The kernels on bytes, made of the weights as they are, in whatever dtype."""

    def __init__(self, block: Any, weights: FusedWeights, dtype: torch.dtype) -> None:
        super().__init__(block, weights, dtype)
        quantised = [Int8Weight.of(weight) for weight in weights.products]
        values, scales = [one.values for one in quantised], [one.scale for one in quantised]
        self.kernels = kernels_on(block, values, dtype, scales).in_panels()

    def runner(self, weights: FusedWeights) -> JoinedKernels:
        return JoinedKernels(weights.norms, self.kernels)


class Int8Products(Kept):
    """The same products by oneDNN."""

    def __init__(self, block: Any, weights: FusedWeights, dtype: torch.dtype) -> None:
        super().__init__(block, weights, dtype)
        # What goes into attention is in what is computed in. All else stays in float32: rounding it would take longer
        # than it saves.
        self.qkv = Int8Product(Int8Weight.of(weights.qkv), dtype)
        self.o, self.wi, self.wo = (Int8Product(Int8Weight.of(weight)) for weight in weights.products[1:])

    def runner(self, weights: FusedWeights) -> JoinedProducts:
        return JoinedProducts(weights.norms, self)

    def feed_forward(self, hidden: Tensor, dense: Any) -> Tensor:
        inner = self.wi(hidden)
        if isinstance(dense, GatedFeedForward):
            gate, up = inner.chunk(2, dim=-1)
            inner = gated(gate, scaled(up, dense.scale), dense.activation)
        else:
            inner = ACTIVATIONS[dense.activation](scaled(inner, dense.scale))
        return self.wo(inner)
