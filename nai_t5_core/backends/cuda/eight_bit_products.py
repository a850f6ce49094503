"""Products of many rows with both sides in 8 bits, by torch: exact sums of int8, or float8 with scales of rows.

A layer's activations are rounded to bytes where they are made (by the norms and the gate), with a scale for each token,
and its sums become numbers where they are added or gated. Only what attention reads and gives has kernels of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.cuda.activations import Bytes, Sums
from nai_t5_core.backends.cuda.byte_launches import as_numbers, gated_in_bytes
from nai_t5_core.backends.cuda.byte_products import ByteProducts
from nai_t5_core.backends.cuda.byte_weight import RowScaled, Weight
from nai_t5_core.backends.cuda.graphs import bucket_of
from nai_t5_core.facts.config import Activation

# Below, products take the time of reading the weights, whatever the activations are.
LEAST_ROWS = 256


class EightBitProducts(ByteProducts):
    """As :class:`ByteProducts`, but from ``least_rows`` on both sides of a layer's products are in 8 bits, where its
    weights have no scales but those of columns: int8 everywhere, float8_e4m3 where the card ``converts_float8``.

    Rows count as many as a CUDA graph would compute for them, so that numbers do not depend on whether there is one.
    """

    def __init__(self, *how: Any, least_rows: int = LEAST_ROWS) -> None:
        super().__init__(*how)
        self.least_rows = least_rows

    def input_bytes(self, weights: RowScaled | None, rows: int) -> torch.dtype | None:
        if weights is None or (bucket_of(rows) or rows) < self.least_rows:
            return None
        is_possible = weights.dtype == torch.int8 or (weights.dtype == torch.float8_e4m3fn and self.converts_float8)
        return weights.dtype if is_possible else None

    def plain(self, x: Any, weight: Weight) -> Tensor:
        if not isinstance(x, Bytes):
            return super().plain(x, weight)
        out = multiplied(x, weight)
        return as_numbers(out, x.dtype) if isinstance(out, Sums) else out

    def activated(self, x: Any, weight: Weight, activation: Activation, is_gated: bool) -> Tensor | Bytes:
        if not isinstance(x, Bytes):
            return super().activated(x, weight, activation, is_gated)
        return gated_in_bytes(multiplied(x, weight), activation, is_gated, x.values.dtype, x.dtype)

    def summed(self, x: Any, weight: Weight) -> Tensor | Sums:
        return multiplied(x, weight) if isinstance(x, Bytes) else super().summed(x, weight)


class AskedEightBitProducts(EightBitProducts):
    """As :class:`EightBitProducts`, but only with weights that ``quantize="int8"`` made: who gives a file in 8 bits
    asks for its numbers, and not for activations that are rounded as coarsely.
    """

    def input_bytes(self, weights: RowScaled | None, rows: int) -> torch.dtype | None:
        return super().input_bytes(weights, rows) if weights is not None and weights.is_asked else None


def multiplied(x: Bytes, weight: Any) -> Tensor | Sums:
    """[tokens, columns]: sums of int8, or of float8 numbers in bfloat16, the only dtype that torch gives them in."""
    if x.values.dtype == torch.int8:
        return Sums(torch._int_mm(x.values, weight.values.t()), x.scales, weight.scales)
    if not x.values.is_cuda:
        # torch multiplies float8 with scales of rows on CUDA only.
        exact = torch.mm(x.values.float(), weight.values.float().t())
        return (exact * x.scales[:, None] * weight.scales).to(x.dtype)
    scales = (x.scales[:, None], weight.scales[None, :])
    return torch._scaled_mm(x.values, weight.values.t(), *scales, out_dtype=torch.bfloat16)
