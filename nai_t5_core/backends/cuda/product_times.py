"""How long the products of a layer take on a device: torch's, and ours in every configuration worth trying."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from nai_t5_core.backends.cuda.activations import Sums
from nai_t5_core.backends.cuda.graph_times import compile_ahead, copies_of, seconds_of
from nai_t5_core.backends.cuda.product_kernel import multiply
from nai_t5_core.backends.cuda.products import Configuration, Kind, arguments, block_rows, product
from nai_t5_core.backends.cuda.torch_products import TorchProducts, UnroundedTorchProducts, sums_in_float32
from nai_t5_core.facts.config import Activation

_ACTIVATION: Activation = "gelu_new"

# A function from inputs and weight to their product.
Way = Callable[[Tensor, Any], Any]


@dataclass(frozen=True)
class ProductShape:
    """A product of a layer; ``gated`` ones have twice as many rows of weight as columns."""

    name: str
    kind: Kind
    columns: int
    depth: int


XXL_SHAPES = (
    ProductShape("qkv", "plain", 12288, 4096),
    ProductShape("o", "summed", 4096, 4096),
    ProductShape("wi", "gated", 10240, 4096),
    ProductShape("wo", "summed", 4096, 10240),
)


@dataclass(frozen=True)
class ProductTime:
    """A measurement; ``error`` is |product − float32 product| / |float32 product|, in the Euclidean norm."""

    shape: ProductShape
    rows: int
    how: Configuration | str
    microseconds: float
    gigabytes_per_second: float
    error: float

    def __str__(self) -> str:
        return (
            f"{self.shape.name:>4} {self.rows:4} rows {self.microseconds:7.1f} µs "
            f"{self.gigabytes_per_second:6.0f} GB/s error {self.error:.1e}  {self.how}"
        )


def candidates(shape: ProductShape, rows: int) -> Iterator[Configuration]:
    """The configurations to try for a product of ``rows`` rows."""
    is_wide = block_rows(rows) == 128
    for columns in (32, 64) if shape.kind == "gated" else (64, 128) if shape.kind == "summed" else (32, 64, 128):
        for depth in (64, 128):
            for parts in (2, 4, 8) if shape.kind == "summed" else (1,):
                warps = 8 if is_wide and columns == (64 if shape.kind == "gated" else 128) else 4
                for stages in (3,) if is_wide or (columns, depth) == (128, 128) else (3, 4):
                    configuration = Configuration(columns, depth, parts, stages, warps)
                    if configuration.fits(shape.columns, shape.depth):
                        yield configuration


@torch.no_grad()
def time_products(
    shapes: Sequence[ProductShape] = XXL_SHAPES,
    rows: Iterable[int] = (16, 32, 64, 128),
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cuda",
    tell: Callable[[ProductTime], None] | None = None,
    overlaps: bool = False,
) -> list[ProductTime]:
    """Times every product by torch and in every candidate configuration; all kernels are compiled before, in parallel.

    Args:
        dtype: of inputs and weights.
        tell: called with each time as soon as it is measured.
        overlaps: have launches of our kernel overlap, see :class:`nai_t5_core.backends.cuda.products.TritonProducts`.

    Returns:
        The times, grouped by product and number of rows, the shortest first in each group.
    """
    times = []
    counts = tuple(rows)
    with torch.cuda.device(device), sums_in_float32():
        for shape in shapes:
            weights = _weights(shape, dtype, device)
            compile_ahead(_launches(shape, counts, weights[0], overlaps))
            for count in counts:
                found = []
                x = torch.randn(count, shape.depth, device=device, dtype=dtype)
                expected = epilogue_of(shape, torch.mm(x.float(), weights[0].float().t()))
                for time in times_of(shape, x, weights, expected, _ways(shape, count, overlaps)):
                    found.append(time)
                    if tell is not None:
                        tell(time)
                times += sorted(found, key=lambda time: time.microseconds)
    return times


def _weights(shape: ProductShape, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    size = (shape.columns * (2 if shape.kind == "gated" else 1), shape.depth)
    copies = range(copies_of(size[0] * size[1] * dtype.itemsize))
    return [torch.randn(size, device=device, dtype=dtype) * shape.depth**-0.5 for _ in copies]


def _launches(shape: ProductShape, counts: Sequence[int], weight: Tensor, overlaps: bool) -> Iterator[Any]:
    for count in counts:
        x = weight.new_empty(count, shape.depth)
        for configuration in candidates(shape, count):
            out = x.new_empty(configuration.parts, count, shape.columns, dtype=out_dtype(shape, x.dtype))
            yield multiply, *arguments(x, weight, out, configuration, *epilogue(shape), overlaps)


def times_of(
    shape: ProductShape,
    x: Tensor,
    weights: Sequence[Any],
    expected: Tensor,
    ways: Iterable[tuple[Configuration | str, Way]],
) -> Iterator[ProductTime]:
    """The time of every way that the card has room for, to multiply x [rows, depth] by weights of one shape.

    Args:
        expected: the product with the first of them, [rows, columns] in float32. Of a way that gives another shape,
            since it leaves the gate out, the error is NaN.
    """
    for how, multiplied in ways:
        try:
            out = multiplied(x, weights[0])
            seconds = seconds_of(partial(multiplied, x), weights)
        except OutOfResources:
            # This card has less shared memory.
            continue
        found = _numbers(out)
        error = float((found - expected).norm() / expected.norm()) if found.shape == expected.shape else float("nan")
        given = out.values if isinstance(out, Sums) else out
        weight = weights[0] if isinstance(weights[0], Tensor) else weights[0].values
        moved = weight.nbytes + x.nbytes + given.nbytes
        yield ProductTime(shape, len(x), how, seconds * 1e6, moved / seconds / 1e9, error)


def _numbers(out: Tensor | Sums) -> Tensor:
    """[rows, columns] float32, of whatever a way gives."""
    if isinstance(out, Sums):
        return out.values * out.row_scales[:, None] * out.column_scales
    return out.sum(0, dtype=torch.float32) if out.ndim == 3 else out.float()


def _ways(shape: ProductShape, rows: int, overlaps: bool) -> Iterator[tuple[Configuration | str, Way]]:
    """Every way to compute a product, with its name or configuration."""
    for name, products in (("torch", TorchProducts()), ("torch, float32", UnroundedTorchProducts())):
        if shape.kind == "summed":
            yield name, products.summed
        elif name == "torch":
            yield name, products.plain if shape.kind == "plain" else _gated_by_torch
    for configuration in candidates(shape, rows):
        yield configuration, _by_kernel(shape, configuration, overlaps)


def _gated_by_torch(x: Tensor, weight: Tensor) -> Tensor:
    return TorchProducts().activated(x, weight, _ACTIVATION, True)


def _by_kernel(shape: ProductShape, configuration: Configuration, overlaps: bool) -> Way:
    def multiplied(x: Tensor, weight: Tensor) -> Tensor:
        return product(x, weight, configuration, out_dtype(shape, x.dtype), *epilogue(shape), overlaps)

    return multiplied


def out_dtype(shape: ProductShape, dtype: torch.dtype) -> torch.dtype:
    """Of a product by our kernels, with inputs in ``dtype``."""
    return torch.float32 if shape.kind == "summed" else dtype


def epilogue(shape: ProductShape) -> tuple[Activation | None, bool]:
    """The activation of a product, and whether it is gated."""
    return (_ACTIVATION, True) if shape.kind == "gated" else (None, False)


def epilogue_of(shape: ProductShape, exact: Tensor) -> Tensor:
    """What becomes of an exact product: [rows, columns], of a gated one half as many columns as it has."""
    if shape.kind != "gated":
        return exact
    gate, up = exact.chunk(2, -1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up
