"""The products that a choice means."""

from __future__ import annotations

from collections.abc import Iterable

from nai_t5_core.backends.cuda.card_choice import Choice
from nai_t5_core.backends.cuda.measured_card import FEW_ROWS, PLAIN_WEIGHTS, TILES, MeasuredProduct
from nai_t5_core.backends.cuda.products import (
    ESTIMATED,
    Configuration,
    Configurations,
    Kind,
    TritonProducts,
    configurations_for,
)
from nai_t5_core.backends.cuda.tiles import Tile, TiledProducts, Tiles
from nai_t5_core.backends.cuda.torch_products import Products, TorchProducts

KINDS: tuple[Kind, ...] = ("plain", "gated", "summed")
ROWS_OF_BLOCKS = (16, 32, 64, 128)


def products_of(choice: Choice) -> Products:
    """What ``products="auto"`` takes."""
    if choice.measured is not None:
        return measured_products(choice.measured.products)
    return TritonProducts(configurations_for(choice.card.capability)) if choice.row.products == FEW_ROWS else TorchProducts()


def measured_products(measured: Iterable[MeasuredProduct]) -> TiledProducts:
    """Every product in the way that was measured to be the fastest, and by torch where nothing was.

    A configuration that does not fit a model's sizes is followed by those that are estimates.
    """
    few: Configurations = {(kind, rows): () for kind in KINDS for rows in ROWS_OF_BLOCKS}
    tiles: Tiles = {}
    for each in measured:
        for kind in KINDS:
            if each.kind == kind and each.weights == PLAIN_WEIGHTS:
                if each.way == FEW_ROWS:
                    few[kind, each.rows] = (Configuration(**each.configuration), *ESTIMATED[kind, each.rows])
                elif each.way == TILES:
                    tiles[kind, each.rows] = Tile(**each.configuration)
    return TiledProducts(few, tiles)
