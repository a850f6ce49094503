"""What the kernels for products share in Triton: what is fetched before the wait, and what becomes of sums."""

from __future__ import annotations

import triton
import triton.language as tl

from nai_t5_core.backends.cuda.kernels import activated

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
