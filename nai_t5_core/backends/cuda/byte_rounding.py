"""Rounding of activations to 8 bits, with a scale for each row, inside of Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

# The smallest normal number of float32, so that a row of zeros can be divided by its scale.
SMALLEST = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def scale_of(largest: tl.tensor, faults: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """The scale of a row by its largest number without sign; NaN if it has ``faults``, which no byte can show."""
    limit: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    return tl.where(faults > 0, float("nan"), tl.maximum(largest, SMALLEST) / limit)


@triton.jit
def in_bytes(values: tl.tensor, scale: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Numbers divided by their scale, in int8 (as the int8 products for the CPU round) or in float8_e4m3."""
    numbers = tl.where(scale == scale, values / scale, 0.0)
    if dtype == tl.int8:
        return tl.floor(numbers + 0.5).to(tl.int8)
    else:
        return numbers.to(dtype)


@triton.jit
def faults_in(values: tl.tensor) -> tl.tensor:
    """How many numbers of a run are not finite."""
    # The comparison is false for NaN as well.
    return tl.sum(tl.where(tl.abs(values) < float("inf"), 0, 1))
