"""How long the products of a layer take on a device from weights in 8 bits, beside torch's from 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.cuda.byte_kinds import BLOCK
from nai_t5_core.backends.cuda.byte_launches import rounded_rows
from nai_t5_core.backends.cuda.byte_product_kernel import multiply_bytes
from nai_t5_core.backends.cuda.byte_products import (
    ByteProducts,
    byte_arguments,
    byte_configurations_on,
    byte_product,
    fits,
    unpacked,
)
from nai_t5_core.backends.cuda.byte_weight import ByteWeight
from nai_t5_core.backends.cuda.card import card_of
from nai_t5_core.backends.cuda.eight_bit_products import multiplied
from nai_t5_core.backends.cuda.graph_times import compile_ahead, copies_of
from nai_t5_core.backends.cuda.product_times import (
    XXL_SHAPES,
    ProductShape,
    ProductTime,
    Way,
    epilogue,
    epilogue_of,
    out_dtype,
    times_of,
)
from nai_t5_core.backends.cuda.products import MOST_ROWS, Configuration, block_rows
from nai_t5_core.backends.cuda.torch_products import TorchProducts, sums_in_float32

KINDS = ("int8", "Q8_0", "float8")
ROWS = (16, 32, 64, 128, 256, 512)


@torch.no_grad()
def time_byte_products(
    kinds: Sequence[str] = KINDS,
    shapes: Sequence[ProductShape] = XXL_SHAPES,
    rows: Iterable[int] = ROWS,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cuda",
    tell: Callable[[str, ProductTime], None] | None = None,
) -> dict[str, list[ProductTime]]:
    """Times every product in every way; our kernels are compiled before, in parallel.

    Args:
        kinds: of :data:`KINDS`.
        rows: up to 128 by our kernel in every candidate configuration; all from an unpacked weight by torch; above
            128 also with both sides in 8 bits, as torch multiplies them.
        dtype: of the inputs.
        tell: called with the kind and each time as soon as it is measured.

    Returns:
        By kind, grouped by product and number of rows, the shortest first in each group.
    """
    found: dict[str, list[ProductTime]] = {kind: [] for kind in kinds}
    counts = tuple(rows)
    with torch.cuda.device(device), sums_in_float32():
        converts = torch.cuda.get_device_capability(device) >= (8, 9)
        for kind in kinds:
            for shape in shapes:
                weights = _weights(shape, kind, device)
                compile_ahead(_launches(shape, counts, weights[0], dtype, converts))
                for count in counts:
                    x = torch.randn(count, shape.depth, device=device, dtype=dtype)
                    ways = _ways(shape, count, weights[0], dtype, converts)
                    group = list(times_of(shape, x, weights, _expected(shape, x, weights[0], converts), ways))
                    for time in group:
                        if tell is not None:
                            tell(kind, time)
                    found[kind] += sorted(group, key=lambda time: time.microseconds)
    return found


def _weights(shape: ProductShape, kind: str, device: torch.device | str) -> list[ByteWeight]:
    columns, depth = shape.columns * (2 if shape.kind == "gated" else 1), shape.depth
    made = []
    for _ in range(copies_of(columns * depth)):
        values = torch.randint(-127, 128, (columns, depth), dtype=torch.int8, device=device)
        if kind == "float8":
            values = values.float().to(torch.float8_e4m3fn)
        blocks = torch.rand(depth // BLOCK, columns, device=device).half() if kind == "Q8_0" else None
        scales = torch.full((columns,), depth**-0.5 / 73, device=device)
        made.append(ByteWeight(values, scales, blocks))
    return made


def _candidates(shape: ProductShape, rows: int, weight: ByteWeight) -> Iterator[Configuration]:
    """What is taken on this card, and others: broader and deeper than for 16 bits, since a tile has half as many bytes,
    but as many of the inputs are read for it.
    """
    if rows > MOST_ROWS:
        return
    table = byte_configurations_on(card_of(weight.values.device))[shape.kind, block_rows(rows)]
    taken = next((known for known in table if fits(known, weight, shape.columns)), None)
    if taken is not None:
        yield taken
    is_gated, is_wide = shape.kind == "gated", block_rows(rows) == MOST_ROWS
    for columns in (32, 64) if rows <= 16 else (64, 128):
        for depth in (64, 128) if is_wide else (128, 256):
            for parts in (2, 4, 8) if shape.kind == "summed" else (1,):
                stages = 3 if is_wide or is_gated or depth == 256 else 4
                # Two groups of warps share out 128 columns, else each would make all numbers of the bytes.
                known = Configuration(columns, depth, parts, stages, warps=8 if columns == 128 else 4)
                if known != taken and fits(known, weight, shape.columns):
                    yield known


def _launches(
    shape: ProductShape, counts: Sequence[int], weight: ByteWeight, dtype: torch.dtype, converts: bool
) -> Iterator[Any]:
    for count in counts:
        x = torch.empty(count, shape.depth, dtype=dtype, device=weight.values.device)
        for configuration in _candidates(shape, count, weight):
            out = x.new_empty(configuration.parts, count, shape.columns, dtype=out_dtype(shape, dtype))
            how = (*epilogue(shape), False, converts)
            yield multiply_bytes, *byte_arguments(x, weight, out, configuration, *how)


def _ways(
    shape: ProductShape, rows: int, weight: ByteWeight, dtype: torch.dtype, converts: bool
) -> Iterator[tuple[Configuration | str, Way]]:
    by_torch = ByteProducts(TorchProducts(), None, converts)
    yield (
        "torch, unpacked",
        by_torch.plain if shape.kind != "gated" else lambda x, w: by_torch.activated(x, w, "gelu_new", True),
    )
    plain = unpacked(weight, slice(0, weight.shape[0]), dtype, converts)
    yield "torch, 16 bits, product alone", lambda x, _: torch.mm(x, plain.t())
    eight = weight.row_scaled
    if rows > MOST_ROWS and eight is not None and (eight.dtype == torch.int8 or converts):
        yield "8 bits on both sides, product alone", lambda x, w: multiplied(rounded_rows(x, eight.dtype, dtype), w)
    for configuration in _candidates(shape, rows, weight):
        yield configuration, _by_kernel(shape, configuration, dtype, converts)


def _by_kernel(shape: ProductShape, configuration: Configuration, dtype: torch.dtype, converts: bool) -> Way:
    how = (configuration, out_dtype(shape, dtype), *epilogue(shape), False, converts)
    return lambda x, weight: byte_product(x, weight, *how)


def _expected(shape: ProductShape, x: Tensor, weight: ByteWeight, converts: bool) -> Tensor:
    plain = unpacked(weight, slice(0, weight.shape[0]), torch.float32, converts)
    return epilogue_of(shape, torch.mm(x.float(), plain.t()))
