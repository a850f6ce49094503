"""Triton kernels between products whose both sides are in 8 bits; :mod:`nai_t5_core.backends.cuda.byte_launches`
describes the arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from nai_t5_core.backends.cuda.byte_rounding import faults_in, in_bytes, scale_of
from nai_t5_core.backends.cuda.kernels import activated, start_next, wait_for_inputs


@triton.jit
def round_rows(
    x: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One row in 8 bits, with its scale. One that is wider than a block is read twice."""
    start_next(overlaps)
    wait_for_inputs(overlaps)
    row = tl.program_id(0).to(tl.int64)
    here = x + row * width
    columns = tl.arange(0, block)
    values = tl.load(here + columns, mask=columns < width, other=0.0).to(tl.float32)
    largest, faults = tl.max(tl.abs(values)), faults_in(values)
    for first in range(block, width, block):
        more = tl.load(here + first + columns, mask=first + columns < width, other=0.0).to(tl.float32)
        largest, faults = tl.maximum(largest, tl.max(tl.abs(more))), faults + faults_in(more)
    scale = scale_of(largest, faults, out.dtype.element_ty)
    tl.store(out + row * width + columns, in_bytes(values, scale, out.dtype.element_ty), mask=columns < width)
    for first in range(block, width, block):
        inside = first + columns < width
        more = tl.load(here + first + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * width + first + columns, in_bytes(more, scale, out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def number_sums(
    sums: tl.tensor,
    row_scales: tl.tensor,
    column_scales: tl.tensor,
    out: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A run of one row of sums as numbers."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    values = numbers_of(sums + row * width, row_scales + row, column_scales, columns, inside, True)
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_in_bytes(
    joined: tl.tensor,
    row_scales: tl.tensor,
    column_scales: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    width: tl.constexpr,
    activation: tl.constexpr,
    is_gated: tl.constexpr,
    has_scales: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One row: act(gate) · up, or act alone, of sums or of numbers; in 8 bits, with its scale.

    It is computed twice, for the row's largest number and for its bytes: a row is too wide to be kept.
    """
    row = tl.program_id(0).to(tl.int64)
    here = joined + row * (2 * width if is_gated else width)
    largest = 0.0
    faults = 0
    for first in range(0, width, block):
        columns = first + tl.arange(0, block)
        values = gated(here, row_scales + row, column_scales, columns, width, activation, is_gated, has_scales)
        largest = tl.maximum(largest, tl.max(tl.abs(values)))
        faults += faults_in(values)
    scale = scale_of(largest, faults, out.dtype.element_ty)
    for first in range(0, width, block):
        columns = first + tl.arange(0, block)
        values = gated(here, row_scales + row, column_scales, columns, width, activation, is_gated, has_scales)
        places = out + row * width + columns
        tl.store(places, in_bytes(values, scale, out.dtype.element_ty), mask=columns < width)
    tl.store(scales + row, scale)


@triton.jit
def gated(
    here: tl.tensor,
    row_scale: tl.tensor,
    column_scales: tl.tensor,
    columns: tl.tensor,
    width: tl.constexpr,
    activation: tl.constexpr,
    is_gated: tl.constexpr,
    has_scales: tl.constexpr,
) -> tl.tensor:
    """act(gate) · up, or act alone, of some columns of a row in float32."""
    inside = columns < width
    result = activated(numbers_of(here, row_scale, column_scales, columns, inside, has_scales), activation)
    if is_gated:
        result *= numbers_of(here + width, row_scale, column_scales + width, columns, inside, has_scales)
    return result


@triton.jit
def numbers_of(
    here: tl.tensor,
    row_scale: tl.tensor,
    column_scales: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
    has_scales: tl.constexpr,
) -> tl.tensor:
    """Some columns of a row in float32; sums times their scales."""
    values = tl.load(here + columns, mask=inside, other=0).to(tl.float32)
    if has_scales:
        values *= tl.load(row_scale) * tl.load(column_scales + columns, mask=inside, other=0.0)
    return values
