"""The product of many rows in Triton, in tiles, with the activation and the gate before it is rounded."""

from __future__ import annotations

import triton
import triton.language as tl

from nai_t5_core.backends.cuda.kernels import start_next, wait_for_inputs
from nai_t5_core.backends.cuda.product_parts import store_products


@triton.jit(do_not_specialize=["rows"])
def multiply_tiles(
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
    """A tile of out[part] = act(x · weightᵀ), or act(gate) · up, over one part of the depth.

    x is [rows, depth], the weight [columns, depth], twice as many where gate and up are one above the other; out is
    [parts, rows, columns]. Blocks divide columns and depth. Programs that run at the same time share weights: the first
    ones compute the first columns of all rows.
    """
    wait_for_inputs(overlaps)
    tile, part = tl.program_id(0), tl.program_id(1)
    row_tiles = tl.cdiv(rows, block_rows)
    m = (tile % row_tiles) * block_rows + tl.arange(0, block_rows)
    n = (tile // row_tiles) * block_columns + tl.arange(0, block_columns)
    k = part * (depth // parts) + tl.arange(0, block_depth)
    # Rows beyond the last are computed as the last one, and not stored.
    inputs = x + tl.minimum(m, rows - 1)[:, None].to(tl.int64) * depth + k[None, :]
    weights = weight + n[None, :].to(tl.int64) * depth + k[:, None]
    total = tl.zeros((block_rows, block_columns), tl.float32)
    up_total = tl.zeros((block_rows, block_columns), tl.float32)
    for step in tl.range(0, depth // parts, block_depth, num_stages=stages):
        values = tl.load(inputs + step)
        total = tl.dot(values, tl.load(weights + step), total)
        if is_gated:
            up_total = tl.dot(values, tl.load(weights + columns * depth + step), up_total)
    start_next(overlaps)
    places = out + (part * rows + m[:, None]).to(tl.int64) * columns + n[None, :]
    store_products(places, total, up_total, (m < rows)[:, None], activation, is_gated)
