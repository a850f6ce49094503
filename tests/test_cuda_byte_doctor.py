"""What the doctor does with weights in 8 bits, as far as it goes without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_toys import DEVICE, ONE_ROUNDING, draw, error

from nai_t5_core.backends.cuda.device_refusals import missing_triton
from nai_t5_core.bench.doctor.numbers import SMALL_CONFIGS
from nai_t5_core.bench.peers import own_encoder, random_state

if missing := missing_triton():
    pytest.skip(missing, allow_module_level=True)

from nai_t5_core.backends.cuda import byte_product_times as times
from nai_t5_core.backends.cuda import int8_product_times as int8_times
from nai_t5_core.backends.cuda.activations import Sums
from nai_t5_core.backends.cuda.encoder import cuda_encoder
from nai_t5_core.backends.cuda.product_times import ProductShape
from nai_t5_core.bench.doctor import eight_bits

SHAPES = (
    ProductShape("qkv", "plain", 128, 256),
    ProductShape("o", "summed", 64, 512),
    ProductShape("wi", "gated", 64, 128),
)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", times.KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_way_that_is_timed_is_right(kind: str, shape: ProductShape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "copies_of", lambda _: 1)
    weight = times._weights(shape, kind, DEVICE)[0]
    for rows in (16, 300):
        x = draw(rows, shape.depth, dtype=torch.float16)
        expected = times._expected(shape, x, weight, True).double()
        ways = dict(times._ways(shape, rows, weight, torch.float16, True))
        assert len(ways) >= (4 if rows == 16 else 3 if kind != "Q8_0" else 2)
        for how, multiply in ways.items():
            out: Any = multiply(x, weight)
            if isinstance(out, Sums):
                out = out.values * out.row_scales[:, None] * out.column_scales
            found = out.sum(0) if out.ndim == 3 else out
            in_8_bits, alone = "8 bits" in str(how), "alone" in str(how)
            if alone and shape.kind == "gated":
                assert found.shape == (rows, 2 * shape.columns)
                continue
            limit = 0.05 if in_8_bits else 3 * ONE_ROUNDING[torch.float16]
            assert error(found, expected) < limit, how


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_way_for_int8_that_is_timed_is_right(shape: ProductShape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_times, "copies_of", lambda _: 1)
    weight = int8_times._weights(shape, DEVICE)[0]
    for rows in (16, 40, 128):
        x = int8_times._drawn(rows, shape.depth, DEVICE)
        expected = int8_times._expected(shape, x, weight).double()
        by_torch, *ours = int8_times._ways(shape, x)
        assert by_torch[0] == "torch" and len(ours) >= 1
        sums: Any = by_torch[1](x.values, weight)
        assert sums.values.shape == (max(rows, 24), shape.columns * (2 if shape.kind == "gated" else 1))
        for configuration, multiply in ours:
            found: Any = multiply(x.values, weight)
            assert found.shape == (configuration.parts, rows, shape.columns)  # type: ignore[union-attr]
            assert error(found.double().sum(0), expected) < 1.5 * ONE_ROUNDING[torch.float16]
    launches = list(int8_times._launches(shape, (16, 128), weight))
    assert len(launches) == sum(len(list(int8_times._candidates(shape, rows))) for rows in (16, 128))


@pytest.mark.parametrize("kind", ["q8_0", "float8"])
@pytest.mark.parametrize("config", SMALL_CONFIGS)
def test_the_small_models_are_what_they_are_compared_with(kind: str, config: str) -> None:
    state = random_state(SMALL_CONFIGS[config])
    stacks = [
        eight_bits.quantised(own_encoder(SMALL_CONFIGS[config], state, torch.float16).to(DEVICE), kind)
        for _ in range(2)
    ]
    held, half = eight_bits._held(stacks[0]), eight_bits._held(own_encoder(SMALL_CONFIGS[config], state, torch.float16))
    assert 0.4 < held / half < 0.8
    ids = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    found = cuda_encoder(stacks[0], eager=True)(ids)
    assert error(found, eight_bits.unpacked(stacks[1])(ids)) < 0.01
