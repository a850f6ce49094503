"""How long the products of a layer take on a device with both sides in int8: torch's, and ours in every configuration
worth trying.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.cuda.activations import Bytes
from nai_t5_core.backends.cuda.byte_weight import ByteWeight
from nai_t5_core.backends.cuda.eight_bit_products import multiplied
from nai_t5_core.backends.cuda.graph_times import compile_ahead, copies_of
from nai_t5_core.backends.cuda.int8_product_kernel import multiply_int8
from nai_t5_core.backends.cuda.int8_products import fits_int8, int8_arguments, int8_candidates, int8_product
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
from nai_t5_core.backends.cuda.products import Configuration
from nai_t5_core.backends.cuda.torch_products import sums_in_float32

_DTYPE = torch.float16
# Torch multiplies no fewer rows of int8 than 17.
_LEAST_BY_TORCH = 24


@torch.no_grad()
def time_int8_products(
    rows: Iterable[int], device: torch.device | str = "cuda", shapes: Sequence[ProductShape] = XXL_SHAPES
) -> list[ProductTime]:
    """Times every product by torch, alone and of as many rows as it takes, and in every candidate configuration; all
    kernels are compiled before, in parallel.

    Args:
        rows: up to 128.
    """
    times: list[ProductTime] = []
    counts = tuple(rows)
    with torch.cuda.device(device), sums_in_float32():
        for shape in shapes:
            weights = _weights(shape, device)
            compile_ahead(_launches(shape, counts, weights[0]))
            for count in counts:
                x = _drawn(count, shape.depth, device)
                times += times_of(shape, x.values, weights, _expected(shape, x, weights[0]), _ways(shape, x))
    return times


def _weights(shape: ProductShape, device: torch.device | str) -> list[ByteWeight]:
    columns = shape.columns * (2 if shape.kind == "gated" else 1)
    scales = torch.full((columns,), shape.depth**-0.5 / 73, device=device)
    copies = range(copies_of(columns * shape.depth))
    return [ByteWeight(_drawn(columns, shape.depth, device).values, scales) for _ in copies]


def _drawn(rows: int, width: int, device: torch.device | str) -> Bytes:
    values = torch.randint(-127, 128, (rows, width), dtype=torch.int8, device=device)
    return Bytes(values, torch.full((rows,), 1 / 73, device=device), _DTYPE)


def _expected(shape: ProductShape, x: Bytes, weight: ByteWeight) -> Tensor:
    exact = torch.mm(x.values.float(), weight.values.float().t())
    return epilogue_of(shape, exact * x.scales[:, None] * weight.scales)


def _candidates(shape: ProductShape, rows: int) -> Iterator[Configuration]:
    return (each for each in int8_candidates(shape.kind, rows) if fits_int8(each, shape.columns, shape.depth))


def _launches(shape: ProductShape, counts: Sequence[int], weight: ByteWeight) -> Iterator[Any]:
    for count in counts:
        x = _drawn(count, shape.depth, weight.values.device)
        for configuration in _candidates(shape, count):
            out = x.scales.new_empty(configuration.parts, count, shape.columns, dtype=out_dtype(shape, _DTYPE))
            yield multiply_int8, *int8_arguments(x, weight, out, configuration, *epilogue(shape))


def _ways(shape: ProductShape, x: Bytes) -> Iterator[tuple[Configuration | str, Way]]:
    more = _drawn(max(len(x), _LEAST_BY_TORCH), shape.depth, x.values.device)
    yield "torch", lambda _, weight: multiplied(more, weight)
    for configuration in _candidates(shape, len(x)):
        yield configuration, _by_kernel(shape, x, configuration)


def _by_kernel(shape: ProductShape, x: Bytes, configuration: Configuration) -> Way:
    how = (configuration, out_dtype(shape, _DTYPE), *epilogue(shape))
    return lambda _, weight: int8_product(x, weight, *how)
