"""Products of up to 128 rows by our own kernel, and the configurations in which it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from nai_t5_core.backends.cuda.launches import overlapping
from nai_t5_core.backends.cuda.product_kernel import multiply
from nai_t5_core.backends.cuda.torch_products import TorchProducts
from nai_t5_core.facts.config import Activation

MOST_ROWS = 128

# What is done with a product: rounded ("plain"); activated, gated and rounded ("gated"); added in float32 ("summed").
Kind = Literal["plain", "gated", "summed"]


@dataclass(frozen=True)
class Configuration:
    """How a product is divided among programs: each computes ``block_columns`` columns over one part of the depth."""

    block_columns: int
    block_depth: int
    parts: int = 1
    stages: int = 4
    warps: int = 4

    def fits(self, columns: int, depth: int) -> bool:
        """Whether blocks and parts divide a product."""
        return columns % self.block_columns == 0 and depth % (self.parts * self.block_depth) == 0


# By the kind of a product and the rows of a block: the first configuration that fits is used; without one, torch.
Configurations = dict[tuple[Kind, int], tuple[Configuration, ...]]

# For sizes that no other configuration fits.
_SMALLEST = Configuration(16, 16, 1, 2)

# Estimates, not measured. All of them fit into the shared memory of consumer cards.
_PLAIN = (Configuration(64, 64), Configuration(32, 64), _SMALLEST)
_PLAIN_WIDE = (Configuration(64, 64, stages=3), Configuration(32, 64, stages=3), _SMALLEST)
_GATED = (Configuration(64, 64), Configuration(32, 32), _SMALLEST)
_GATED_WIDE = (Configuration(64, 64, stages=3, warps=8), Configuration(32, 64, stages=3), _SMALLEST)
_SUMMED = (*(Configuration(64, 64, parts) for parts in (4, 2, 1)), _SMALLEST)
_SUMMED_WIDE = (*(Configuration(64, 64, parts, stages=3) for parts in (4, 2, 1)), _SMALLEST)

ESTIMATED: Configurations = {
    **{("plain", rows): _PLAIN for rows in (16, 32, 64)},
    **{("gated", rows): _GATED for rows in (16, 32, 64)},
    **{("summed", rows): _SUMMED for rows in (16, 32, 64)},
    ("plain", 128): _PLAIN_WIDE,
    ("gated", 128): _GATED_WIDE,
    ("summed", 128): _SUMMED_WIDE,
}

# Measured on an H200 with the layers of a T5-XXL, whose launches overlap; torch's were faster for 128 rows. Without
# overlaps these are as fast as any.
HOPPER: Configurations = {
    **{("plain", rows): (Configuration(64, 128, stages=3), *_PLAIN) for rows in (16, 32, 64)},
    **{("gated", rows): _GATED for rows in (16, 32, 64)},
    **{("summed", rows): (Configuration(64, 128, 2), *_SUMMED) for rows in (16, 32, 64)},
    **{(kind, 128): () for kind in ("plain", "gated", "summed")},
}


def block_rows(rows: int) -> int:
    """The block size of a program for a number of rows: 16, 32, 64 or 128."""
    return max(16, 1 << (rows - 1).bit_length())


class TritonProducts(TorchProducts):
    """Products of up to 128 rows by our own kernel; torch computes larger ones, and those that no configuration fits.

    Args:
        configurations: the configurations to choose from for each kind of product.
        overlapping_rows: up to how many rows launches overlap, see
            :meth:`nai_t5_core.backends.cuda.torch_products.Products.overlaps`; this needs compute capability 9.0. Each
            prefetches weights while the launches before it still run.
    """

    def __init__(self, configurations: Configurations, overlapping_rows: int = 0) -> None:
        self.configurations = configurations
        self.overlapping_rows = overlapping_rows

    def overlaps(self, rows: int, in_bytes: bool, inputs_in_bytes: bool = False) -> bool:
        return rows <= self.overlapping_rows

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        chosen = self._chosen("plain", x, *weight.shape)
        if chosen is None:
            return super().plain(x, weight)
        return product(x, weight, chosen, x.dtype, overlaps=self.overlaps(len(x), False))[0]

    def activated(self, x: Tensor, weight: Tensor, activation: Activation, is_gated: bool) -> Tensor:
        columns, depth = weight.shape
        chosen = self._chosen("gated" if is_gated else "plain", x, columns // 2 if is_gated else columns, depth)
        if chosen is None:
            return super().activated(x, weight, activation, is_gated)
        return product(x, weight, chosen, x.dtype, activation, is_gated, self.overlaps(len(x), False))[0]

    def summed(self, x: Tensor, weight: Tensor) -> Tensor:
        chosen = self._chosen("summed", x, *weight.shape)
        if chosen is None:
            return super().summed(x, weight)
        return product(x, weight, chosen, torch.float32, overlaps=self.overlaps(len(x), False))

    def _chosen(self, kind: Kind, x: Tensor, columns: int, depth: int) -> Configuration | None:
        """The first configuration that fits; None where none does, or there are more rows than the kernel takes."""
        if not 0 < len(x) <= MOST_ROWS:
            return None
        known = self.configurations[kind, block_rows(len(x))]
        return next((configuration for configuration in known if configuration.fits(columns, depth)), None)


def product(
    x: Tensor,
    weight: Tensor,
    configuration: Configuration,
    dtype: torch.dtype,
    activation: Activation | None = None,
    is_gated: bool = False,
    overlaps: bool = False,
) -> Tensor:
    """x · weightᵀ as partial sums over parts of the depth, each computed in float32.

    Args:
        x: [rows, depth], contiguous, of up to 128 rows.
        weight: [columns, depth] in the same dtype; with ``is_gated`` gate and up, one above the other.
        dtype: of the result.
        activation: of the product, or of its gate; it needs the whole depth in one part, and so does gating.
        overlaps: whether this launch overlaps with those before and after it, see
            :meth:`nai_t5_core.backends.cuda.torch_products.Products.overlaps`.

    Returns:
        [parts, rows, columns].

    Raises:
        ValueError: rows or a configuration that do not fit.
    """
    (rows, depth), columns = x.shape, weight.shape[0] // (2 if is_gated else 1)
    does_fit, is_one = configuration.fits(columns, depth), bool(activation or is_gated)
    out = empty_product((rows, columns, depth), configuration, does_fit, is_one, dtype, x.device)
    tensors, constants = arguments(x, weight, out, configuration, activation, is_gated, overlaps)
    multiply[grid_of(out, configuration)](*tensors, **constants)
    return out


def empty_product(
    sizes: tuple[int, int, int],
    configuration: Configuration,
    does_fit: bool,
    is_one: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Room for a product of few rows: [parts, rows, columns].

    Args:
        sizes: rows, columns and depth.
        does_fit: whether the configuration divides them, as its kernel needs it.
        is_one: whether the product has to be in one part, since it is activated or gated.

    Raises:
        ValueError: rows or a configuration that do not fit.
    """
    rows, columns, depth = sizes
    if rows > MOST_ROWS or not does_fit or (is_one and configuration.parts > 1):
        raise ValueError(f"{configuration} does not fit {rows} rows, {columns} columns and a depth of {depth}")
    return torch.empty(configuration.parts, rows, columns, dtype=dtype, device=device)


def grid_of(out: Tensor, configuration: Configuration) -> tuple[int, int]:
    """The programs that compute a product of few rows, [parts, rows, columns]."""
    return out.shape[2] // configuration.block_columns, configuration.parts


def arguments(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    configuration: Configuration,
    activation: Activation | None = None,
    is_gated: bool = False,
    overlaps: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The kernel's arguments for a :func:`product`: those of the call, and the constants that it is compiled for."""
    constants = constants_of(x, out, configuration, block_rows(len(x)), activation, is_gated, overlaps)
    return (x, weight, out, len(x)), constants


class Blocks(Protocol):
    """How a product is divided among programs, save for its rows."""

    @property
    def block_columns(self) -> int: ...
    @property
    def block_depth(self) -> int: ...
    @property
    def parts(self) -> int: ...
    @property
    def stages(self) -> int: ...
    @property
    def warps(self) -> int: ...


def constants_of(
    x: Tensor, out: Tensor, blocks: Blocks, rows: int, activation: Activation | None, is_gated: bool, overlaps: bool
) -> dict[str, Any]:
    """What every kernel for products is compiled for: of x [rows, depth] and out [parts, rows, columns].

    ``rows`` is how many a program computes.
    """
    return {
        "columns": out.shape[2],
        "depth": x.shape[1],
        "block_rows": rows,
        "block_columns": blocks.block_columns,
        "block_depth": blocks.block_depth,
        "parts": blocks.parts,
        "activation": activation or "none",
        "is_gated": is_gated,
        "stages": blocks.stages,
        "num_warps": blocks.warps,
        **overlapping(overlaps),
    }
