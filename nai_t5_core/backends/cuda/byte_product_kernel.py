"""The product of a few rows with a weight in 8 bits, in Triton: as many bytes are read as there are.

Numbers are made of bytes in registers, in the dtype of the inputs, which holds each of them exactly. What a column is
multiplied by is multiplied into its sum, in float32. Blocks of 32 numbers with a scale of their own are multiplied by
it before: one rounding to the inputs' dtype, as of an unpacked weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nai_t5_core.backends.cuda.kernels import start_next, wait_for_inputs
from nai_t5_core.backends.cuda.product_parts import fetch_rows, store_products

# Numbers that share a scale of a block.
BLOCK = tl.constexpr(32)


@triton.jit
def numbers(packed: tl.tensor, kind: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """The numbers that bytes stand for.

    A multiprocessor converts 16 integers in a clock, fewer than bytes arrive. So int8 becomes float16 by arithmetic:
    the bits of 1024 and a byte below them, whose sign was turned, are 1152 more than its number. For bfloat16 the
    compiler knows such a way itself.

    float8_e4m3 has no infinities: its NaN are expected in the scales of columns. Cards before capability 8.9 lack
    instructions for it; "by bits" shifts sign, exponent and mantissa into their places in float16, whose exponent is
    larger by 8 there.
    """
    if kind == "int8":
        if dtype == tl.float16:
            word = packed.to(tl.uint8, bitcast=True).to(tl.uint16) ^ 0x6480
            found = word.to(tl.float16, bitcast=True) - 1152.0
        else:
            found = packed.to(dtype)
    elif kind == "float8_e5m2":
        found = (packed.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(dtype)
    elif kind == "float8_e4m3":
        found = packed.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(dtype)
    else:
        tl.static_assert(kind == "float8_e4m3, by bits", "unknown kind")
        word = packed.to(tl.uint16)
        half = ((word & 0x80) << 8) | ((word & 0x7F) << 7)
        found = (half.to(tl.float16, bitcast=True) * 256.0).to(dtype)
    return found


@triton.jit
def scaled_numbers(
    weights: tl.tensor,
    scales: tl.tensor,
    kind: tl.constexpr,
    has_blocks: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """A tile of a weight [columns, depth] in ``dtype``, with blocks times their ``scales`` [depth / 32, columns]."""
    # No other program reads the same weights.
    tile = numbers(tl.load(weights, eviction_policy="evict_first"), kind, dtype)
    if has_blocks:
        columns: tl.constexpr = tile.shape[0]
        depth: tl.constexpr = tile.shape[1]
        blocks = tile.reshape(columns, depth // BLOCK, BLOCK)
        scale = tl.trans(tl.load(scales))[:, :, None]
        if dtype == tl.float16:
            blocks *= scale
        else:
            blocks = (blocks.to(tl.float32) * scale.to(tl.float32)).to(dtype)
        tile = blocks.reshape(columns, depth)
    return tile


@triton.jit(do_not_specialize=["rows"])
def multiply_bytes(
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    block_scales: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.constexpr,
    depth: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_depth: tl.constexpr,
    parts: tl.constexpr,
    kind: tl.constexpr,
    has_blocks: tl.constexpr,
    activation: tl.constexpr,
    is_gated: tl.constexpr,
    stages: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """As :func:`nai_t5_core.backends.cuda.product_kernel.multiply`, of bytes [columns, depth] of a ``kind``.

    scales are [columns], and scales of blocks [depth / 32, columns]; twice as many columns of each where gate and up
    are one above the other.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    n = tile * block_columns + tl.arange(0, block_columns)
    m = tl.arange(0, block_rows)
    start = part * (depth // parts)
    k = start + tl.arange(0, block_depth)
    is_row = m < rows
    weights = weight + n[:, None].to(tl.int64) * depth + k[None, :]
    inputs = x + m[None, :] * depth + k[:, None]
    total_columns: tl.constexpr = 2 * columns if is_gated else columns
    # Without blocks these are not read.
    row = start // BLOCK + tl.arange(0, block_depth // BLOCK if has_blocks else 1)
    scale_rows = block_scales + row[:, None] * total_columns + n[None, :]
    if overlaps:
        fetch_rows(weight + n[:, None].to(tl.int64) * depth + start, columns * depth, is_gated)
    wait_for_inputs(overlaps)
    dtype: tl.constexpr = x.dtype.element_ty
    total = tl.zeros((block_columns, block_rows), tl.float32)
    up_total = tl.zeros((block_columns, block_rows), tl.float32)
    for step in tl.range(0, depth // parts, block_depth, num_stages=stages):
        here = scale_rows + step // BLOCK * total_columns
        w = scaled_numbers(weights + step, here, kind, has_blocks, dtype)
        values = tl.load(inputs + step, mask=is_row[None, :], other=0.0)
        total = tl.dot(w, values, total)
        if is_gated:
            up = scaled_numbers(weights + columns * depth + step, here + columns, kind, has_blocks, dtype)
            up_total = tl.dot(up, values, up_total)
    start_next(overlaps)
    total *= tl.load(scales + n)[:, None]
    if is_gated:
        up_total *= tl.load(scales + columns + n)[:, None]
    places = out + (part * rows + m[None, :]).to(tl.int64) * columns + n[:, None]
    store_products(places, total, up_total, is_row[None, :], activation, is_gated)


@triton.jit
def unpack_bytes(
    weight: tl.tensor,
    scales: tl.tensor,
    block_scales: tl.tensor,
    out: tl.tensor,
    columns: tl.tensor,
    all_columns: tl.tensor,
    depth: tl.tensor,
    kind: tl.constexpr,
    has_blocks: tl.constexpr,
    block_columns: tl.constexpr,
    block_depth: tl.constexpr,
) -> None:
    """A block of a weight [columns, depth] with its scales, rounded once: the product is taken in float32.

    Scales of blocks are [depth / 32, all_columns].
    """
    n = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    k = tl.program_id(0) * block_depth + tl.arange(0, block_depth)
    inside = (n < columns)[:, None] & (k < depth)[None, :]
    places = n[:, None].to(tl.int64) * depth + k[None, :]
    values = numbers(tl.load(weight + places, mask=inside, other=0), kind, tl.float16).to(tl.float32)
    if has_blocks:
        of_block = block_scales + (k // BLOCK)[None, :] * all_columns + n[:, None]
        values *= tl.load(of_block, mask=inside, other=0.0).to(tl.float32)
    values *= tl.load(scales + n, mask=n < columns, other=0.0)[:, None]
    tl.store(out + places, values.to(out.dtype.element_ty), mask=inside)
