"""An encoder block in 8 bits, computed by the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.backends.int8_linear import Int8Linear, Int8Weight
from nai_t5_core.backends.packed_block import PackedBlock
from nai_t5_core.model.layers import FoldedRMSNorm


class Int8Block(PackedBlock):
    """A block with its weights packed in 8 bits; activations are stored in the model's dtype.

    Args:
        block: one that :meth:`takes` accepts; its projections are taken out of it.
        dtype: that of the model, bfloat16 or float32.
    """

    @classmethod
    def takes(cls, block: nn.Module) -> bool:
        """Whether the kernels can compute a block in 8 bits."""
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        return super().takes(block) and all(linear.in_features % 4 == 0 for linear in linears)

    @staticmethod
    def _joined(projections: list[Any]) -> Any:
        if isinstance(projections[0], Int8Linear):
            return Int8Weight.joined([projection.bytes_weight for projection in projections])
        return PackedBlock._joined(projections)

    def _prepare(self, weights: list[Any], dtype: torch.dtype) -> None:
        norms = [layer.layer_norm for layer in self.layer]
        # A norm's weight that was folded into a projection is taken out of it, and multiplies activations again.
        folded = [norm.folded_weight if isinstance(norm, FoldedRMSNorm) else None for norm in norms]
        in_scales = (folded[0], None, folded[1], None)
        quantised = [
            weight if isinstance(weight, Int8Weight) else Int8Weight.of(weight, in_scale)
            for weight, in_scale in zip(weights, in_scales, strict=True)
        ]
        self.in_scales = [weight.in_scale for weight in quantised]
        values, scales = zip(*((weight.values, weight.scale) for weight in quantised), strict=True)
        self.kernels = self._kernels_on(values, dtype, scales).packed()
        self.is_packed = True

    def _norm_weights(self) -> list[Tensor | None]:
        in_scales = (self.in_scales[0], self.in_scales[2])
        both = zip(super()._norm_weights(), in_scales, strict=True)
        return [_joined(weight, in_scale) for weight, in_scale in both]

    def _weight_at(self, place: int) -> Tensor:
        return self._bytes_at(place).plain()

    def _bytes_at(self, place: int) -> Int8Weight:
        kept = self.kernels.weights[place]
        assert kept.scales is not None
        return Int8Weight(kept.unpacked(), kept.scales, self.in_scales[place])

    def _projections(self, place: int, names: tuple[str, ...]) -> list[nn.Module]:
        dtype = self.kernels.weights[place].dtype
        parts = self._bytes_at(place).chunk(len(names))
        return [Int8Linear.named(name, part, dtype) for name, part in zip(names, parts, strict=True)]

    def extra_repr(self) -> str:
        return "kernels, in 8 bits"


def _joined(weight: Tensor | None, in_scale: Tensor | None) -> Tensor | None:
    """What multiplies activations; a live LoRA gives a folded norm a weight beside what was taken out of its place."""
    if weight is None or in_scale is None:
        return in_scale if weight is None else weight
    return weight * in_scale
