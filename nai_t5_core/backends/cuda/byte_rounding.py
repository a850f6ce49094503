"""Rounding of activations to 8 bits, with a scale for each row, inside of Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

# What the largest number of a row is taken for at least, so that a row of zeros can be divided by its scale.
SMALLEST = tl.constexpr(1e-30)


@triton.jit
def scale_of(largest: tl.tensor, faults: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """The scale of a row by its largest number without sign; NaN if it has ``faults``, which no byte can show."""
    limit: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0  # of int8, or of float8_e4m3 as bytes
    return tl.where(faults > 0, float("nan"), tl.maximum(largest, SMALLEST) / limit)


@triton.jit
def in_bytes(values: tl.tensor, scale: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Numbers divided by their scale: in int8, as the int8 products for the CPU round, or in uint8, as float8_e4m3."""
    numbers = tl.where(scale == scale, values / scale, 0.0)
    if dtype == tl.int8:  # noqa: SIM108  # Triton compiles one branch only
        rounded = tl.floor(numbers + 0.5).to(tl.int8)
    else:
        rounded = in_float8(numbers)
    return rounded


@triton.jit
def in_float8(numbers: tl.tensor) -> tl.tensor:
    """The bytes of float8_e4m3 that are nearest to numbers of up to 448, even ones between two."""
    bits = numbers.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # 20 bits of the mantissa are cut off, and 120 is what the exponents differ by.
    near = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 numbers are multiples of 2^-9; a sum with 2^23 is rounded to a whole number.
    whole = (tl.abs(numbers) * 512.0 + 8388608.0) - 8388608.0
    near = tl.where(tl.abs(numbers) < 0.015625, whole.to(tl.int32), near)
    return (near | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def faults_in(values: tl.tensor) -> tl.tensor:
    """How many numbers of a run are not finite."""
    # The comparison is false for NaN as well.
    return tl.sum(tl.where(tl.abs(values) < float("inf"), 0, 1))
