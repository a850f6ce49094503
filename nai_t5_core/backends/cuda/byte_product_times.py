"""How long the products of a layer take on a device from weights in 8 bits, beside torch's from 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from nai_t5_core.backends.cuda.activations import Sums
from nai_t5_core.backends.cuda.byte_kinds import BLOCK
from nai_t5_core.backends.cuda.byte_launches import rounded_rows
from nai_t5_core.backends.cuda.byte_product_kernel import multiply_bytes
from nai_t5_core.backends.cuda.byte_products import ByteProducts, byte_arguments, byte_product, fits, unpacked
from nai_t5_core.backends.cuda.byte_weight import ByteWeight
from nai_t5_core.backends.cuda.eight_bit_products import LEAST_ROWS, multiplied
from nai_t5_core.backends.cuda.product_times import (
    XXL_SHAPES,
    ProductShape,
    ProductTime,
    candidates,
    copies_of,
    epilogue,
    seconds_of,
)
from nai_t5_core.backends.cuda.products import MOST_ROWS, Configuration
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
        rows: up to 128 by our kernel in every candidate configuration; all from an unpacked weight by torch; from 256
            on also with both sides in 8 bits, as :class:`EightBitProducts` multiplies them.
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
                _compile(shape, counts, weights[0], dtype, converts)
                for count in counts:
                    group = list(_times(shape, count, weights, dtype, converts))
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
    """Those that are tried for 16 bits, where they fit."""
    for known in candidates(shape, rows) if rows <= MOST_ROWS else ():
        if fits(known, weight, shape.columns):
            yield known


def _compile(
    shape: ProductShape, counts: Sequence[int], weight: ByteWeight, dtype: torch.dtype, converts: bool
) -> None:
    with triton.AsyncCompileMode(ThreadPoolExecutor()):
        for count in counts:
            x = torch.empty(count, shape.depth, dtype=dtype, device=weight.values.device)
            for configuration in _candidates(shape, count, weight):
                out_dtype = torch.float32 if shape.kind == "summed" else dtype
                out = torch.empty(configuration.parts, count, shape.columns, dtype=out_dtype, device=x.device)
                how = (*epilogue(shape), False, converts)
                tensors, constants = byte_arguments(x, weight, out, configuration, *how)
                multiply_bytes.warmup(*tensors, grid=(1,), **constants)


def _times(
    shape: ProductShape, rows: int, weights: Sequence[ByteWeight], dtype: torch.dtype, converts: bool
) -> Iterator[ProductTime]:
    x = torch.randn(rows, shape.depth, device=weights[0].values.device, dtype=dtype)
    expected = _expected(shape, x, weights[0], converts)
    for how, multiply in _ways(shape, rows, weights[0], dtype, converts):
        try:
            out: Any = multiply(x, weights[0])
        except OutOfResources:
            # This card has less shared memory.
            continue
        seconds = seconds_of(multiply, x, weights)
        if isinstance(out, Sums):
            out = out.values * out.row_scales[:, None] * out.column_scales
        same = out.sum(0, dtype=torch.float32) if out.ndim == 3 else out.float()
        # With both sides in 8 bits the gate is no part of it.
        error = float((same - expected).norm() / expected.norm()) if same.shape == expected.shape else float("nan")
        moved = weights[0].values.nbytes + x.nbytes + out.nbytes
        yield ProductTime(shape, rows, how, seconds * 1e6, moved / seconds / 1e9, error)


def _ways(
    shape: ProductShape, rows: int, weight: ByteWeight, dtype: torch.dtype, converts: bool
) -> Iterator[tuple[Configuration | str, Callable[[Tensor, Any], Any]]]:
    by_torch = ByteProducts(TorchProducts(), None, converts)
    yield (
        "torch, unpacked",
        by_torch.plain if shape.kind != "gated" else lambda x, w: by_torch.activated(x, w, "gelu_new", True),
    )
    plain = unpacked(weight, slice(0, weight.shape[0]), dtype, converts)
    yield "torch, 16 bits, product alone", lambda x, _: torch.mm(x, plain.t())
    eight = weight.row_scaled_dtype
    if rows >= LEAST_ROWS and eight is not None and (eight == torch.int8 or converts):
        yield "8 bits on both sides, product alone", lambda x, w: multiplied(rounded_rows(x, eight, dtype), w)
    for configuration in _candidates(shape, rows, weight):
        yield configuration, _by_kernel(shape, configuration, dtype, converts)


def _by_kernel(
    shape: ProductShape, configuration: Configuration, dtype: torch.dtype, converts: bool
) -> Callable[[Tensor, Any], Any]:
    out_dtype = torch.float32 if shape.kind == "summed" else dtype
    how = (configuration, out_dtype, *epilogue(shape), False, converts)
    return lambda x, weight: byte_product(x, weight, *how)


def _expected(shape: ProductShape, x: Tensor, weight: ByteWeight, converts: bool) -> Tensor:
    plain = unpacked(weight, slice(0, weight.shape[0]), torch.float32, converts)
    exact = torch.mm(x.float(), plain.t())
    if shape.kind != "gated":
        return exact
    gate, up = exact.chunk(2, -1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up
