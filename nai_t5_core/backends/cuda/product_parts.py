"""What the kernels for products share in Triton: what is fetched before the wait, sums, and what becomes of these."""

from __future__ import annotations

import triton
import triton.language as tl

from nai_t5_core.backends.cuda.kernels import activated, start_next, wait_for_inputs

# A program prefetches this many lines of each row of its weight while the launch before still runs.
FETCHED_LINES = tl.constexpr(2)
BYTES_OF_A_LINE = tl.constexpr(128)


@triton.jit
def fetch(places: tl.tensor) -> None:
    """Prefetches lines of memory into the L2 cache."""
    code: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(code, "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def fetch_rows(rows: tl.tensor, to_up: tl.constexpr, is_gated: tl.constexpr) -> None:
    """Prefetches the first lines of some rows of a weight [rows, 1], and of those that are ``to_up`` numbers behind.

    Only weights may be read before the wait: no earlier launch writes them.
    """
    line: tl.constexpr = BYTES_OF_A_LINE // (rows.dtype.element_ty.primitive_bitwidth // 8)
    lines = rows + (tl.arange(0, FETCHED_LINES) * line)[None, :]
    fetch(lines)
    if is_gated:
        fetch(lines + to_up)


@triton.jit
def sums_of_few_rows(
    x: tl.tensor,
    weight: tl.tensor,
    rows: tl.tensor,
    columns: tl.constexpr,
    depth: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_depth: tl.constexpr,
    parts: tl.constexpr,
    dtype: tl.constexpr,
    is_gated: tl.constexpr,
    stages: tl.constexpr,
    overlaps: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """x · weightᵀ of a block of columns over one part of the depth, which are the program's two numbers in the grid:
    [block_columns, block_rows] in ``dtype``; and the same of up, zeros where the weight is not ``is_gated``.

    x is [rows, depth], the weight [columns, depth] in the same dtype, twice as many columns where gate and up are one
    above the other. With ``overlaps`` the next launch may start when this ends.
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
    total = tl.zeros((block_columns, block_rows), dtype)
    up_total = tl.zeros((block_columns, block_rows), dtype)
    for step in tl.range(0, depth // parts, block_depth, num_stages=stages):
        # No other program reads the same weights.
        w = tl.load(weights + step, eviction_policy="evict_first")
        values = tl.load(inputs + step, mask=is_row[None, :], other=0)
        total = tl.dot(w, values, total, out_dtype=dtype)
        if is_gated:
            up = tl.load(weights + columns * depth + step, eviction_policy="evict_first")
            up_total = tl.dot(up, values, up_total, out_dtype=dtype)
    start_next(overlaps)
    return total, up_total


@triton.jit
def store_products(
    places: tl.tensor,
    total: tl.tensor,
    up_total: tl.tensor,
    inside: tl.tensor,
    activation: tl.constexpr,
    is_gated: tl.constexpr,
) -> None:
    """Activates and gates sums in float32, and rounds them once."""
    if activation != "none":
        total = activated(total, activation)
    if is_gated:
        total *= up_total
    tl.store(places, total.to(places.dtype.element_ty), mask=inside)
