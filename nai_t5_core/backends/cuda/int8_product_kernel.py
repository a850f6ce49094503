"""The product of a few rows in int8 with a weight in int8, in Triton: no byte is converted, and sums are exact."""

from __future__ import annotations

import triton
import triton.language as tl

from nai_t5_core.backends.cuda.product_parts import store_products, sums_of_few_rows


@triton.jit(do_not_specialize=["rows"])
def multiply_int8(
    x: tl.tensor,
    row_scales: tl.tensor,
    weight: tl.tensor,
    column_scales: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.constexpr,
    depth: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_depth: tl.constexpr,
    parts: tl.constexpr,
    activation: tl.constexpr,
    is_gated: tl.constexpr,
    stages: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """As :func:`nai_t5_core.backends.cuda.product_kernel.multiply`, of int8, with sums in int32.

    A sum is multiplied by the scale of its row, [rows], and that of its column, [columns]; twice as many of these where
    gate and up are one above the other.
    """
    total, up_total = sums_of_few_rows(
        x,
        weight,
        rows,
        columns,
        depth,
        block_rows,
        block_columns,
        block_depth,
        parts,
        tl.int32,
        is_gated,
        stages,
        overlaps,
    )
    n = tl.program_id(0) * block_columns + tl.arange(0, block_columns)
    m = tl.arange(0, block_rows)
    is_row = m < rows
    of_rows = tl.load(row_scales + m, mask=is_row, other=0.0)[None, :]
    numbers = total.to(tl.float32) * tl.load(column_scales + n)[:, None] * of_rows
    up_numbers = numbers
    if is_gated:
        up_numbers = up_total.to(tl.float32) * tl.load(column_scales + columns + n)[:, None] * of_rows
    places = out + (tl.program_id(1) * rows + m[None, :]).to(tl.int64) * columns + n[:, None]
    store_products(places, numbers, up_numbers, is_row[None, :], activation, is_gated)
