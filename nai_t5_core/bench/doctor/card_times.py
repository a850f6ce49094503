"""How long each way takes on a card to compute the products and the attention of a layer of a T5-XXL."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from nai_t5_core.backends.cuda import kernels
from nai_t5_core.backends.cuda.attention_shapes import AttentionShape, candidates
from nai_t5_core.backends.cuda.card import Card
from nai_t5_core.backends.cuda.card_choice import MEASURED_HEADS
from nai_t5_core.backends.cuda.documents import document_table
from nai_t5_core.backends.cuda.graph_times import compile_ahead, seconds_of
from nai_t5_core.backends.cuda.int8_product_times import time_int8_products
from nai_t5_core.backends.cuda.launches import Documents, attend, attention_arguments, attention_table
from nai_t5_core.backends.cuda.measured_card import FEW_ROWS, TILES, TORCH
from nai_t5_core.backends.cuda.product_times import (
    XXL_SHAPES,
    ProductShape,
    ProductTime,
    epilogue,
    out_dtype,
    time_products,
)
from nai_t5_core.backends.cuda.products import Kind
from nai_t5_core.backends.cuda.tile_kernel import multiply_tiles
from nai_t5_core.backends.cuda.tiles import TILED_ROWS, Tile, tile_arguments, tile_candidates, tiled
from nai_t5_core.backends.cuda.torch_products import TorchProducts, sums_in_float32
from nai_t5_core.facts.config import Activation
from nai_t5_core.model.packing import DocumentGroup

FEW = (16, 32, 64, 128)
ATTENTION_TOKENS = (16, 32, 64, 128, 256, 512, 1024)
_HEADS, _REACH = 64, 128
_ACTIVATION: Activation = "gelu_new"
_COPIES = 4
# Tokens of a short prompt.
_SHORT = 32


@dataclass(frozen=True)
class WayTime:
    """The time of one way; ``kind`` is that of a product, or ``"attention"``, and ``rows`` its rows or tokens."""

    kind: str
    rows: int
    way: str
    microseconds: float
    configuration: dict[str, int] = field(default_factory=dict)


def by_kind(times: Iterator[tuple[ProductShape, int, str, dict[str, int], float]]) -> list[WayTime]:
    """The times of one way summed over the products of a kind; a way that one of them lacks is left out."""
    sums: dict[tuple[str, int, str, tuple[tuple[str, int], ...]], list[float]] = defaultdict(list)
    for shape, rows, way, configuration, microseconds in times:
        sums[shape.kind, rows, way, tuple(configuration.items())].append(microseconds)
    products = {kind: sum(shape.kind == kind for shape in XXL_SHAPES) for kind in ("plain", "gated", "summed")}
    return [
        WayTime(kind, rows, way, sum(found), dict(configuration))
        for (kind, rows, way, configuration), found in sums.items()
        if len(found) == products[kind]
    ]


def times_of_few_rows(device: torch.device) -> list[WayTime]:
    """Products of up to 128 rows by torch and by our kernel for few rows."""
    return by_kind(_few_rows(time_products(rows=FEW, device=device)))


def times_of_int8(device: torch.device) -> list[WayTime]:
    """The same of int8 with weights in int8."""
    return by_kind(_few_rows(time_int8_products(FEW, device)))


def _few_rows(times: Iterable[ProductTime]) -> Iterator[tuple[ProductShape, int, str, dict[str, int], float]]:
    for each in times:
        if each.how == TORCH:
            yield each.shape, each.rows, TORCH, {}, each.microseconds
        elif not isinstance(each.how, str):
            yield each.shape, each.rows, FEW_ROWS, asdict(each.how), each.microseconds


@torch.no_grad()
def times_of_tiles(card: Card, device: torch.device) -> list[WayTime]:
    """Products of more rows by torch and in tiles; all kernels are compiled before, in parallel."""
    with torch.cuda.device(device), sums_in_float32():
        return by_kind(_times_of_tiles(card, device))


def _times_of_tiles(card: Card, device: torch.device) -> Iterator[tuple[ProductShape, int, str, dict[str, int], float]]:
    for shape in XXL_SHAPES:
        columns = shape.columns * (2 if shape.kind == "gated" else 1)
        weights = [_drawn(columns, shape.depth, device) * shape.depth**-0.5 for _ in range(_COPIES)]
        tiles = list(tile_candidates(shape.kind, card.capability == (9, 0)))
        compile_ahead(_launches(shape, tiles, weights[0]))
        for rows in TILED_ROWS:
            x = _drawn(rows, shape.depth, device)
            yield shape, rows, TORCH, {}, _microseconds(partial(_by_torch, shape.kind, x), weights)
            for tile in tiles:
                if tile.fits(shape.columns, shape.depth):
                    try:
                        time = _microseconds(partial(_by_tiles, shape, x, tile), weights)
                    except OutOfResources:
                        # This card has less shared memory.
                        continue
                    yield shape, rows, TILES, asdict(tile), time


def _launches(shape: ProductShape, tiles: list[Tile], weight: Tensor) -> Iterator[Any]:
    x = weight.new_empty(TILED_ROWS[0], shape.depth)
    for tile in tiles:
        out = x.new_empty(tile.parts, len(x), shape.columns, dtype=out_dtype(shape, x.dtype))
        yield multiply_tiles, *tile_arguments(x, weight, out, tile, *epilogue(shape))


def _by_torch(kind: Kind, x: Tensor, weight: Tensor) -> Tensor:
    products = TorchProducts()
    return products.activated(x, weight, _ACTIVATION, True) if kind == "gated" else products.plain(x, weight)


def _by_tiles(shape: ProductShape, x: Tensor, tile: Tile, weight: Tensor) -> Tensor:
    return tiled(x, weight, tile, out_dtype(shape, x.dtype), *epilogue(shape))


@torch.no_grad()
def times_of_attention(card: Card, device: torch.device) -> list[WayTime]:
    """Attention in every shape that is tried: the geometric mean of the times for one document and for many."""
    found = []
    table = attention_table(torch.randn(_HEADS, 2 * _REACH + 1, device=device))
    with torch.cuda.device(device):
        compile_ahead(_attention_launches(card, table))
        for tokens in ATTENTION_TOKENS:
            rows = [_drawn(tokens, 3 * _HEADS * MEASURED_HEADS, device) for _ in range(_COPIES)]
            for shape in candidates(tokens, card.architecture):
                tables = (_documents(tokens, each, shape, device) for each in (tokens, min(tokens, _SHORT)))
                times = [_microseconds(partial(_attend, table, documents), rows) for documents in tables]
                found.append(WayTime("attention", tokens, "ours", math.prod(times) ** 0.5, asdict(shape)))
    return found


def _attention_launches(card: Card, table: Tensor) -> Iterator[Any]:
    tokens = max(ATTENTION_TOKENS)
    qkv = _drawn(tokens, 3 * _HEADS * MEASURED_HEADS, table.device)
    out = qkv.new_empty(tokens, _HEADS * MEASURED_HEADS)
    for shape in candidates(tokens, card.architecture):
        documents = _documents(tokens, tokens, shape, table.device)
        yield kernels.attend, *attention_arguments(qkv, table, documents, out, 1.0)


def _documents(tokens: int, length: int, shape: AttentionShape, device: torch.device) -> Documents:
    """As many documents of one length as a row has room for."""
    count = tokens // length
    group = DocumentGroup(0, count, length, 0, length)
    return Documents(document_table([group], shape.queries).to(device), shape)


def _attend(table: Tensor, documents: Documents, qkv: Tensor) -> Tensor:
    return attend(qkv, table, documents, 1.0)


def _drawn(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, device=device, dtype=torch.float16)


def _microseconds(call: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> float:
    return seconds_of(call, inputs) * 1e6
