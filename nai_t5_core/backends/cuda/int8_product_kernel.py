"""The product of a few rows in int8 with a weight in int8, in Triton: no byte is converted, and sums are exact."""

from __future__ import annotations

import triton
import triton.language as tl

from nai_t5_core.backends.cuda.kernels import start_next, wait_for_inputs
from nai_t5_core.backends.cuda.product_parts import fetch_rows, store_products


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
    tile, part = tl.program_id(0), tl.program_id(1)
    n = tile * block_columns + tl.arange(0, block_columns)
    m = tl.arange(0, block_rows)
    k = part * (depth // parts) + tl.arange(0, block_depth)
    is_row = m < rows
    weights = weight + n[:, None].to(tl.int64) * depth + k[None, :]
    inputs = x + m[None, :] * depth + k[:, None]
    if overlaps:
        fetch_rows(weight + n[:, None].to(tl.int64) * depth + part * (depth // parts), columns * depth, is_gated)
    wait_for_inputs(overlaps)
    total = tl.zeros((block_columns, block_rows), tl.int32)
    up_total = tl.zeros((block_columns, block_rows), tl.int32)
    for step in tl.range(0, depth // parts, block_depth, num_stages=stages):
        # No other program reads the same weights.
        w = tl.load(weights + step, eviction_policy="evict_first")
        values = tl.load(inputs + step, mask=is_row[None, :], other=0)
        total = tl.dot(w, values, total, out_dtype=tl.int32)
        if is_gated:
            up = tl.load(weights + columns * depth + step, eviction_policy="evict_first")
            up_total = tl.dot(up, values, up_total, out_dtype=tl.int32)
    start_next(overlaps)
    of_rows = tl.load(row_scales + m, mask=is_row, other=0.0)[None, :]
    numbers = total.to(tl.float32) * tl.load(column_scales + n)[:, None] * of_rows
    up_numbers = numbers
    if is_gated:
        up_numbers = up_total.to(tl.float32) * tl.load(column_scales + columns + n)[:, None] * of_rows
    places = out + (part * rows + m[None, :]).to(tl.int64) * columns + n[:, None]
    store_products(places, numbers, up_numbers, is_row[None, :], activation, is_gated)
