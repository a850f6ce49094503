"""Products of up to 128 rows in int8 with weights in int8, by our own kernel, and its configurations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.cuda.activations import Bytes
from nai_t5_core.backends.cuda.byte_weight import ByteWeight
from nai_t5_core.backends.cuda.int8_product_kernel import multiply_int8
from nai_t5_core.backends.cuda.measured_card import FEW_ROWS, MeasuredProduct
from nai_t5_core.backends.cuda.products import (
    Configuration,
    Configurations,
    Kind,
    block_rows,
    constants_of,
    empty_product,
    grid_of,
)
from nai_t5_core.facts.config import Activation

# What needs more bytes of shared memory than this is not tried.
_MOST_SHARED = 192 << 10
# A card multiplies int8 along 32 numbers at a time.
LEAST_DEPTH = 32

# Estimates, not measured: a program reads as many bytes as one of our kernel for 16 bits, in the configurations that
# were measured to be the fastest of that. All of them fit into the shared memory of consumer cards.
_SMALLEST = Configuration(16, LEAST_DEPTH, 1, 2)
_PLAIN = (Configuration(64, 256, stages=3), Configuration(64, 128, stages=3), Configuration(32, 64, stages=3))
_GATED = (Configuration(64, 128, stages=3), Configuration(32, 64, stages=3))
_SUMMED = (*(Configuration(64, 256, parts, stages=3) for parts in (2, 1)), Configuration(64, 64, stages=3))
_WIDE = (Configuration(64, 128, stages=3), Configuration(32, 64, stages=3))
_GATED_WIDE = (Configuration(64, 128, stages=3, warps=8), Configuration(32, 64, stages=3))
_SUMMED_WIDE = (*(Configuration(64, 128, parts, stages=3) for parts in (2, 1)), Configuration(64, 64, stages=3))

ESTIMATED_FOR_INT8: Configurations = {
    **{("plain", rows): (*_PLAIN, _SMALLEST) for rows in (16, 32, 64)},
    **{("gated", rows): (*_GATED, _SMALLEST) for rows in (16, 32, 64)},
    **{("summed", rows): (*_SUMMED, _SMALLEST) for rows in (16, 32, 64)},
    ("plain", 128): (*_WIDE, _SMALLEST),
    ("gated", 128): (*_GATED_WIDE, _SMALLEST),
    ("summed", 128): (*_SUMMED_WIDE, _SMALLEST),
}


def int8_product(
    x: Bytes,
    weight: ByteWeight,
    configuration: Configuration,
    dtype: torch.dtype,
    activation: Activation | None = None,
    is_gated: bool = False,
    overlaps: bool = False,
) -> Tensor:
    """As :func:`nai_t5_core.backends.cuda.products.product`, of int8 with a weight in int8.

    Args:
        x: [rows, depth] in int8, of up to 128 rows.

    Returns:
        [parts, rows, columns].

    Raises:
        ValueError: rows or a configuration that do not fit.
    """
    (rows, depth), columns = x.values.shape, weight.shape[0] // (2 if is_gated else 1)
    does_fit, is_one = fits_int8(configuration, columns, depth), bool(activation or is_gated)
    out = empty_product((rows, columns, depth), configuration, does_fit, is_one, dtype, x.values.device)
    tensors, constants = int8_arguments(x, weight, out, configuration, activation, is_gated, overlaps)
    multiply_int8[grid_of(out, configuration)](*tensors, **constants)
    return out


def int8_arguments(
    x: Bytes,
    weight: ByteWeight,
    out: Tensor,
    configuration: Configuration,
    activation: Activation | None = None,
    is_gated: bool = False,
    overlaps: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The kernel's arguments for an :func:`int8_product`: those of the call, and the constants of its compilation."""
    constants = constants_of(x.values, out, configuration, block_rows(len(x)), activation, is_gated, overlaps)
    return (x.values, x.scales, weight.values, weight.scales, out, len(x)), constants


def int8_configurations(measured: Iterable[MeasuredProduct]) -> Configurations:
    """What was measured to be the fastest, followed by the estimates, for what it does not fit."""
    found = {(each.kind, each.rows): Configuration(**each.configuration) for each in measured if each.way == FEW_ROWS}
    return {
        key: (found[key], *estimated) if key in found else estimated for key, estimated in ESTIMATED_FOR_INT8.items()
    }


def int8_candidates(kind: Kind, rows: int) -> Iterator[Configuration]:
    """The configurations to try for a product of ``rows`` rows; a card may lack the shared memory for some."""
    for columns in (64, 128):
        for depth in (128, 256):
            # Two groups of warps share out 128 columns.
            warps, stages = 4 * columns // 64, 4 if depth == 128 and rows <= 64 else 3
            read = depth * (columns * (2 if kind == "gated" else 1) + block_rows(rows))
            if stages * read <= _MOST_SHARED:
                for parts in (2, 4) if kind == "summed" else (1,):
                    yield Configuration(columns, depth, parts, stages, warps)


def fits_int8(configuration: Configuration, columns: int, depth: int) -> bool:
    """Whether blocks and parts divide a product, and blocks are as deep as cards need them."""
    return configuration.block_depth >= LEAST_DEPTH and configuration.fits(columns, depth)
