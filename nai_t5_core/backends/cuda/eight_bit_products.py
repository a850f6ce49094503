"""Products with both sides in 8 bits: exact sums of int8, of few rows by our own kernel and of more by torch; or float8
with scales of rows, by torch.

A layer's activations are rounded to bytes where they are made (by norms, and for many rows by the gate), with a scale
for each token. Sums of few rows become numbers in their product; those of many where they are added or gated. What has
no place for that has kernels of its own: of few rows what attention and the gate give, of many what attention reads
and gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.cuda.activations import Bytes, Sums
from nai_t5_core.backends.cuda.byte_launches import as_numbers, gated_in_bytes, rounded_rows
from nai_t5_core.backends.cuda.byte_products import ByteProducts
from nai_t5_core.backends.cuda.byte_weight import RowScaled, Weight
from nai_t5_core.backends.cuda.graphs import bucket_of
from nai_t5_core.backends.cuda.int8_products import ESTIMATED_FOR_INT8, fits_int8, int8_product
from nai_t5_core.backends.cuda.products import MOST_ROWS, Configurations, Kind, block_rows
from nai_t5_core.facts.config import Activation

# Of rows of float8, which only torch multiplies: below, products take the time of reading the weights.
LEAST_ROWS_OF_FLOAT8 = 256


class EightBitProducts(ByteProducts):
    """As :class:`ByteProducts`, but both sides of a layer's products are in 8 bits where its weights have no scales but
    those of columns: int8 from ``least_rows`` on, float8_e4m3 from 256 on where the card ``converts_float8``.

    Rows count as many as a CUDA graph would compute for them, so that numbers do not depend on whether there is one.

    Args:
        int8_configurations: of our kernel for int8, to choose from for each kind of product.
        int8_overlapping_rows: up to how many rows of int8 launches overlap, of those that our kernel multiplies.
    """

    def __init__(
        self,
        *how: Any,
        least_rows: int = 1,
        int8_configurations: Configurations = ESTIMATED_FOR_INT8,
        int8_overlapping_rows: int = 0,
    ) -> None:
        super().__init__(*how)
        self.least_rows, self.int8_configurations = least_rows, int8_configurations
        self.int8_overlapping_rows = int8_overlapping_rows

    def overlaps(self, rows: int, in_bytes: bool, inputs_in_bytes: bool = False) -> bool:
        if inputs_in_bytes:
            return rows <= min(self.int8_overlapping_rows, MOST_ROWS)
        return super().overlaps(rows, in_bytes)

    def input_bytes(self, weights: RowScaled | None, rows: int) -> torch.dtype | None:
        if weights is None:
            return None
        computed = bucket_of(rows) or rows
        if weights.dtype == torch.int8:
            return torch.int8 if computed >= self.least_rows else None
        is_possible = weights.dtype == torch.float8_e4m3fn and self.converts_float8
        return weights.dtype if is_possible and computed >= max(self.least_rows, LEAST_ROWS_OF_FLOAT8) else None

    def plain(self, x: Any, weight: Weight) -> Tensor:
        if not isinstance(x, Bytes):
            return super().plain(x, weight)
        if _are_few(x):
            return self._of_few("plain", x, weight, x.dtype)[0]
        out = multiplied(x, weight)
        return as_numbers(out, x.dtype) if isinstance(out, Sums) else out

    def activated(self, x: Any, weight: Weight, activation: Activation, is_gated: bool) -> Tensor | Bytes:
        if not isinstance(x, Bytes):
            return super().activated(x, weight, activation, is_gated)
        if _are_few(x):
            made = self._of_few("gated" if is_gated else "plain", x, weight, x.dtype, activation)[0]
            return rounded_rows(made, x.values.dtype, x.dtype, self.overlaps(len(x), True, True))
        return gated_in_bytes(multiplied(x, weight), activation, is_gated, x.values.dtype, x.dtype)

    def summed(self, x: Any, weight: Weight) -> Tensor | Sums:
        if not isinstance(x, Bytes):
            return super().summed(x, weight)
        return self._of_few("summed", x, weight, torch.float32) if _are_few(x) else multiplied(x, weight)

    def _of_few(
        self, kind: Kind, x: Bytes, weight: Any, dtype: torch.dtype, activation: Activation | None = None
    ) -> Tensor:
        """[parts, rows, columns]. A configuration fits: of :attr:`ByteWeight.row_scaled` sizes are multiples of 32."""
        is_gated = kind == "gated"
        columns, depth = weight.shape[0] // (2 if is_gated else 1), weight.shape[1]
        known = self.int8_configurations[kind, block_rows(len(x))]
        configuration = next(each for each in known if fits_int8(each, columns, depth))
        overlaps = self.overlaps(len(x), True, True)
        return int8_product(x, weight, configuration, dtype, activation, is_gated, overlaps)


class AskedEightBitProducts(EightBitProducts):
    """As :class:`EightBitProducts`, but only with weights that ``quantize="int8"`` made: who gives a file in 8 bits
    asks for its numbers, and not for activations that are rounded as coarsely.
    """

    def input_bytes(self, weights: RowScaled | None, rows: int) -> torch.dtype | None:
        return super().input_bytes(weights, rows) if weights is not None and weights.is_asked else None


def _are_few(x: Bytes) -> bool:
    """Whether our kernel multiplies them."""
    return x.values.dtype == torch.int8 and len(x) <= MOST_ROWS


def multiplied(x: Bytes, weight: Any) -> Tensor | Sums:
    """[tokens, columns] by torch: sums of int8, or of float8 numbers in bfloat16, the only dtype that it gives them in.

    Of int8 at least 17 tokens.
    """
    if x.values.dtype == torch.int8:
        return Sums(torch._int_mm(x.values, weight.values.t()), x.scales, weight.scales)
    if not x.values.is_cuda:
        # torch multiplies float8 with scales of rows on CUDA only.
        exact = torch.mm(x.values.float(), weight.values.float().t())
        return (exact * x.scales[:, None] * weight.scales).to(x.dtype)
    scales = (x.scales[:, None], weight.scales[None, :])
    return torch._scaled_mm(x.values, weight.values.t(), *scales, out_dtype=torch.bfloat16)
