"""The product of a few rows in Triton. Its time is that of reading the weight, which is the left operand, read once."""

from __future__ import annotations

import triton
import triton.language as tl

from nai_t5_core.backends.cuda.kernels import start_next, wait_for_inputs
from nai_t5_core.backends.cuda.product_parts import fetch_rows, store_products


@triton.jit(do_not_specialize=["rows"])
def multiply(
    x: tl.tensor,
    weight: tl.tensor,
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
    """All rows of a block of columns, over one part of the depth: out[part] = act(x · weightᵀ), or act(gate) · up.

    x is [rows, depth], the weight [columns, depth], twice as many where gate and up are one above the other; out is
    [parts, rows, columns]. Blocks divide columns and depth, and block_rows holds all rows.
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
    total = tl.zeros((block_columns, block_rows), tl.float32)
    up_total = tl.zeros((block_columns, block_rows), tl.float32)
    for step in tl.range(0, depth // parts, block_depth, num_stages=stages):
        # No other program reads the same weights.
        w = tl.load(weights + step, eviction_policy="evict_first")
        values = tl.load(inputs + step, mask=is_row[None, :], other=0.0)
        total = tl.dot(w, values, total)
        if is_gated:
            up = tl.load(weights + columns * depth + step, eviction_policy="evict_first")
            up_total = tl.dot(up, values, up_total)
    start_next(overlaps)
    places = out + (part * rows + m[None, :]).to(tl.int64) * columns + n[:, None]
    store_products(places, total, up_total, is_row[None, :], activation, is_gated)
