"""Products of more than 128 rows in tiles by our own kernel, which also activates and gates them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from nai_t5_core.backends.cuda.products import MOST_ROWS, Configurations, Kind, TritonProducts, constants_of
from nai_t5_core.backends.cuda.tile_kernel import multiply_tiles
from nai_t5_core.facts.config import Activation

# Rows up to which a tile is chosen for each kind of product; longer rows take the last one's.
TILED_ROWS = (256, 512, 1024)


@dataclass(frozen=True)
class Tile:
    """What one program computes of a product, over one part of the depth."""

    block_rows: int
    block_columns: int
    block_depth: int = 64
    parts: int = 1
    stages: int = 4
    warps: int = 8

    def fits(self, columns: int, depth: int) -> bool:
        """Whether tiles and parts divide a product; there may be any number of rows."""
        return columns % self.block_columns == 0 and depth % (self.parts * self.block_depth) == 0


# By the kind of a product and the number of rows, one of TILED_ROWS, up to which a tile is used; without one, torch.
Tiles = dict[tuple[Kind, int], Tile]


class TiledProducts(TritonProducts):
    """As :class:`nai_t5_core.backends.cuda.products.TritonProducts`, and longer products in tiles, where there are
    tiles for them.
    """

    def __init__(self, configurations: Configurations, tiles: Tiles, overlapping_rows: int = 0) -> None:
        super().__init__(configurations, overlapping_rows)
        self.tiles = tiles

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        tile = self._tile("plain", x, *weight.shape)
        return super().plain(x, weight) if tile is None else tiled(x, weight, tile, x.dtype)[0]

    def activated(self, x: Tensor, weight: Tensor, activation: Activation, is_gated: bool) -> Tensor:
        columns, depth = weight.shape
        tile = self._tile("gated", x, columns // 2, depth) if is_gated else self._tile("plain", x, columns, depth)
        if tile is None:
            return super().activated(x, weight, activation, is_gated)
        return tiled(x, weight, tile, x.dtype, activation, is_gated)[0]

    def summed(self, x: Tensor, weight: Tensor) -> Tensor:
        tile = self._tile("summed", x, *weight.shape)
        return super().summed(x, weight) if tile is None else tiled(x, weight, tile, torch.float32)

    def _tile(self, kind: Kind, x: Tensor, columns: int, depth: int) -> Tile | None:
        if len(x) <= MOST_ROWS:
            return None
        tile = self.tiles.get((kind, tiled_rows(len(x))))
        return tile if tile is not None and tile.fits(columns, depth) else None


def tiled_rows(rows: int) -> int:
    """Under which of TILED_ROWS a product of so many rows is looked up."""
    return next((most for most in TILED_ROWS if rows <= most), TILED_ROWS[-1])


def tiled(
    x: Tensor,
    weight: Tensor,
    tile: Tile,
    dtype: torch.dtype,
    activation: Activation | None = None,
    is_gated: bool = False,
) -> Tensor:
    """x · weightᵀ as partial sums over parts of the depth, each computed in float32.

    Args:
        x: [rows, depth], contiguous.
        weight: [columns, depth] in the same dtype; with ``is_gated`` gate and up, one above the other.
        dtype: of the result.
        activation: of the product, or of its gate; it needs the whole depth in one part, and so does gating.

    Returns:
        [parts, rows, columns].

    Raises:
        ValueError: a tile that does not fit.
    """
    (rows, depth), columns = x.shape, weight.shape[0] // (2 if is_gated else 1)
    if not tile.fits(columns, depth) or ((activation or is_gated) and tile.parts > 1):
        raise ValueError(f"{tile} does not fit {columns} columns and a depth of {depth}")
    out = torch.empty(tile.parts, rows, columns, dtype=dtype, device=x.device)
    tensors, constants = tile_arguments(x, weight, out, tile, activation, is_gated)
    grid = (triton.cdiv(rows, tile.block_rows) * (columns // tile.block_columns), tile.parts)
    multiply_tiles[grid](*tensors, **constants)
    return out


def tile_arguments(
    x: Tensor, weight: Tensor, out: Tensor, tile: Tile, activation: Activation | None, is_gated: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The kernel's arguments for :func:`tiled`: those of the call, and the constants that it is compiled for."""
    constants = constants_of(x, out, tile, tile.block_rows, activation, is_gated, overlaps=False)
    return (x, weight, out, len(x)), constants


def tile_candidates(kind: Kind, has_wide_products: bool) -> Iterator[Tile]:
    """The tiles to try, none of which spills registers.

    Args:
        has_wide_products: whether the card multiplies by groups of four warps, which read both sides from shared
            memory (compute capability 9.0).
    """
    if kind == "gated":
        yield Tile(128, 64)
        yield Tile(64, 64, warps=4)
        if has_wide_products:
            yield Tile(128, 128)
            yield Tile(128, 128, stages=3)
        return
    yield Tile(128, 128)
    yield Tile(64, 128, warps=4)
    yield Tile(128, 256, stages=3)
    if kind == "summed":
        yield Tile(128, 128, parts=2)
        yield Tile(128, 256, parts=2, stages=3)
