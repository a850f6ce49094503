"""The product of a few rows in Triton. Its time is that of reading the weight, which is the left operand, read once."""

from __future__ import annotations

import triton
import triton.language as tl

from nai_t5_core.backends.cuda.product_parts import store_products, sums_of_few_rows


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
        tl.float32,
        is_gated,
        stages,
        overlaps,
    )
    n = tl.program_id(0) * block_columns + tl.arange(0, block_columns)
    m = tl.arange(0, block_rows)
    places = out + (tl.program_id(1) * rows + m[None, :]).to(tl.int64) * columns + n[:, None]
    store_products(places, total, up_total, (m < rows)[None, :], activation, is_gated)
