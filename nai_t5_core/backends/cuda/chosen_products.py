"""The products that a choice means."""

from __future__ import annotations

from collections.abc import Iterable

from nai_t5_core.backends.cuda.amd_products import AMD
from nai_t5_core.backends.cuda.byte_products import ByteProducts, byte_configurations_on
from nai_t5_core.backends.cuda.card import Card
from nai_t5_core.backends.cuda.card_choice import Choice
from nai_t5_core.backends.cuda.eight_bit_products import AskedEightBitProducts
from nai_t5_core.backends.cuda.int8_products import int8_configurations
from nai_t5_core.backends.cuda.measured_card import FEW_ROWS, PLAIN_WEIGHTS, TILES, MeasuredProduct
from nai_t5_core.backends.cuda.products import (
    ESTIMATED,
    HOPPER,
    Configuration,
    Configurations,
    TritonProducts,
)
from nai_t5_core.backends.cuda.tiles import Tile, TiledProducts, Tiles
from nai_t5_core.backends.cuda.torch_products import Products, TorchProducts


def products_of(choice: Choice, may_overlap: bool = True) -> Products:
    """What ``products="auto"`` takes; ``may_overlap`` is whether launches overlap where that is the choice."""
    card = choice.card
    how = (plain_products_of(choice, may_overlap), byte_configurations_on(card), card.converts_float8)
    if choice.int8_inputs_from is None:
        return ByteProducts(*how)
    return AskedEightBitProducts(
        *how,
        least_rows=choice.int8_inputs_from,
        int8_configurations=int8_configurations(choice.int8_products),
        int8_overlapping_rows=choice.int8_overlapping_rows if may_overlap else 0,
    )


def plain_products_of(choice: Choice, may_overlap: bool = True) -> Products:
    """The same for weights in 16 bits."""
    overlapping_rows = choice.overlapping_rows if may_overlap else 0
    if choice.measured is not None:
        return measured_products(choice.measured.products, overlapping_rows)
    by_kernel = choice.row.products == FEW_ROWS
    if not by_kernel:
        return TorchProducts()
    return TritonProducts(configurations_on(choice.card), overlapping_rows)


def configurations_on(card: Card | None) -> Configurations:
    """The configurations of our kernel for few rows on a card; None stands for the interpreter."""
    if card is not None and card.is_amd:
        return AMD
    return HOPPER if card is not None and card.capability == (9, 0) else ESTIMATED


def measured_products(measured: Iterable[MeasuredProduct], overlapping_rows: int = 0) -> TiledProducts:
    """Every product in the way that was measured to be the fastest, and by torch where nothing was.

    Launches overlap up to ``overlapping_rows``. A configuration that does not fit a model's sizes is followed by those
    that are estimates.
    """
    few: Configurations = dict.fromkeys(ESTIMATED, ())
    tiles: Tiles = {}
    known = [each for each in measured if each.weights == PLAIN_WEIGHTS]
    for kind, rows in ESTIMATED:
        for each in known:
            if (each.kind, each.rows, each.way) == (kind, rows, FEW_ROWS):
                few[kind, rows] = (Configuration(**each.configuration), *ESTIMATED[kind, rows])
    for each in known:
        if each.way == TILES:
            tiles[each.kind, each.rows] = Tile(**each.configuration)  # type: ignore[index]
    return TiledProducts(few, tiles, overlapping_rows)
