"""A layer's products with weights in an order of their own, for a T5 on the CPU. They are a second copy, and faster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from comfy_nai_t5.fused import FusedWeights, JoinedKernels, JoinedProducts, kernels_on, projections
from nai_t5_core.backends.kernels.weights import WEIGHT_FORMATS
from nai_t5_core.backends.onednn import OneDNNProduct
from nai_t5_core.backends.products import feed_forward
from nai_t5_core.model.block import BlockRunner
from nai_t5_core.model.layers import GatedFeedForward


class Kept(ABC):
    """What is made of the weights that a layer has now.

    What ComfyUI patches are the originals, so it serves while the originals are the same parameters with the same
    values. Of values that are changed behind torch's back it knows nothing: see ``SharedStack.is_hooked``.
    """

    def __init__(self, block: Any, weights: FusedWeights, dtype: torch.dtype) -> None:
        self._made_of = _originals(block)

    @abstractmethod
    def runner(self, weights: FusedWeights) -> BlockRunner:
        """What computes the layer in the next call; of its ``weights`` only those of norms are read."""

    def is_made_of(self, block: Any) -> bool:
        """Whether the layer still has the weights that this was made of."""
        now = _originals(block)
        return all(
            weight is old and version == old_version
            for (weight, version), (old, old_version) in zip(now, self._made_of, strict=True)
        )


class KeptKernels(Kept):
    """The kernels on the weights of one layer, put in panels by their second call."""

    def __init__(self, block: Any, weights: FusedWeights, dtype: torch.dtype) -> None:
        super().__init__(block, weights, dtype)
        self.kernels = kernels_on(block, weights.cast(dtype, but=WEIGHT_FORMATS).products, dtype)
        self._called = False

    def runner(self, weights: FusedWeights) -> JoinedKernels:
        while self._called and not self.kernels.is_in_panels:
            self.kernels = self.kernels.with_next_in_panels()
        self._called = True
        return JoinedKernels(weights.norms, self.kernels)


class KeptProducts(Kept):
    """The products of one layer in ``dtype``, by oneDNN. Each is reordered by its second call."""

    def __init__(self, block: Any, weights: FusedWeights, dtype: torch.dtype) -> None:
        super().__init__(block, weights, dtype)
        dense = block.layer[-1].DenseReluDense
        cast = weights.cast(dtype)
        self.qkv, self.o, self.wo = map(OneDNNProduct, (cast.qkv, cast.o, cast.wo))
        self.inner = [OneDNNProduct(part) for part in cast.wi.chunk(2 if isinstance(dense, GatedFeedForward) else 1)]

    def runner(self, weights: FusedWeights) -> JoinedProducts:
        return JoinedProducts(weights.norms, self)

    def feed_forward(self, hidden: Tensor, dense: Any) -> Tensor:
        return feed_forward(hidden, self.inner, self.wo, dense.activation, dense.scale)


def _originals(block: Any) -> list[tuple[Tensor, int]]:
    """The weights of a layer's projections, and how often each was changed in place."""
    weights = [linear.weight for linear in projections(block)]
    return [(weight, 0 if weight.is_inference() else weight._version) for weight in weights]
