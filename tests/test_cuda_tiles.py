"""Products of many rows in tiles, in the interpreter or on a GPU, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_toys import DEVICE, ONE_ROUNDING, PRODUCT_DTYPES, draw, error

from nai_t5_core.backends.cuda.device_refusals import missing_triton
from nai_t5_core.facts.config import Activation
from nai_t5_core.model.layers import ACTIVATIONS

if missing := missing_triton():
    pytest.skip(missing, allow_module_level=True)

from nai_t5_core.backends.cuda.products import ESTIMATED
from nai_t5_core.backends.cuda.tiles import TILED_ROWS, Tile, TiledProducts, tile_candidates, tiled, tiled_rows

SMALL = Tile(32, 16, 16, stages=2, warps=4)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("rows", [1, 32, 33, 100])
@pytest.mark.parametrize("tile", [SMALL, Tile(64, 64, 32, 3), Tile(16, 32, 64, 2)])
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_tiles_are_summed_in_float32(rows: int, tile: Tile, dtype: torch.dtype) -> None:
    x, weight = draw(rows, 384, dtype=dtype), draw(192, 384, seed=1, dtype=dtype)
    found = tiled(x, weight, tile, torch.float32)
    assert found.shape == (tile.parts, rows, 192)
    assert error(found.sum(0), x.double() @ weight.double().T) < 1e-6


@pytest.mark.parametrize("kind", ["plain", "gated", "summed"])
def test_every_tile_that_is_tried_is_right(kind: Any) -> None:
    for tile in tile_candidates(kind, True):
        x, weight = draw(130, 256, dtype=torch.float16), draw(512, 256, seed=1, dtype=torch.float16) * 0.1
        exact = x.double() @ weight.double().T
        if kind == "gated":
            gates, up = exact.chunk(2, -1)
            found = tiled(x, weight, tile, torch.float32, "gelu_new", True)[0]
            exact = ACTIVATIONS["gelu_new"](gates) * up
        else:
            found = tiled(x, weight, tile, torch.float32).sum(0)
        assert error(found, exact) < 2e-6


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_activated_tiles_are_rounded_once(activation: Activation, is_gated: bool, dtype: torch.dtype) -> None:
    tiles = TiledProducts(ESTIMATED, {("gated", 256): SMALL, ("plain", 256): SMALL})
    x, weight = draw(129, 128, dtype=dtype), draw(192, 128, seed=1, dtype=dtype) * 0.1
    exact = x.double() @ weight.double().T
    gates, up = exact.chunk(2, -1) if is_gated else (exact, 1)
    found = tiles.activated(x, weight, activation, is_gated)
    assert found.dtype == dtype
    assert error(found, ACTIVATIONS[activation](gates) * up) < ONE_ROUNDING[dtype]


def test_long_products_take_the_tile_of_their_size_and_others_do_not() -> None:
    assert [tiled_rows(rows) for rows in (129, 256, 257, 1024, 5000)] == [256, 256, 512, 1024, 1024]
    products = TiledProducts(ESTIMATED, {("summed", rows): SMALL for rows in TILED_ROWS[:1]})
    weight = draw(64, 64, seed=1, dtype=torch.float16)
    for rows, by_tiles in ((100, False), (130, True), (300, False)):
        x = draw(rows, 64, dtype=torch.float16)
        found = products.summed(x, weight)
        assert (found.ndim == 3 and found.dtype == torch.float32 and rows > 128) == by_tiles
        exact = x.double() @ weight.double().T
        assert error(found.double().sum(0) if found.ndim == 3 else found, exact) < ONE_ROUNDING[torch.float16]
    odd = draw(40, 64, seed=1, dtype=torch.float16)
    assert products.summed(draw(130, 64, dtype=torch.float16), odd).ndim == 2


def test_tiles_that_do_not_fit_are_refused() -> None:
    x, weight = torch.zeros(5, 64, device=DEVICE).half(), torch.zeros(64, 64, device=DEVICE).half()
    for tile, activation in ((Tile(32, 48, 16), None), (Tile(32, 64, 48), None), (Tile(32, 64, 16, 2), "relu")):
        with pytest.raises(ValueError, match="does not fit"):
            tiled(x, weight, tile, torch.float32, activation)  # type: ignore[arg-type]
