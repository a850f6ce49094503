"""Weights in 8 bits on CUDA: the kernels, in the interpreter or on a GPU, against float64."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise
from typing import Any

import pytest
import torch
from byte_toys import KINDS, exact_weight, linear_of
from cuda_toys import DEVICE, HAS_GPU, ONE_ROUNDING, PRODUCT_DTYPES, draw, error

from nai_t5_core.backends.cuda.device_refusals import missing_triton
from nai_t5_core.facts.config import Activation
from nai_t5_core.model.layers import ACTIVATIONS

if missing := missing_triton():
    pytest.skip(missing, allow_module_level=True)

from nai_t5_core.backends.cuda.activations import Bytes, Sums
from nai_t5_core.backends.cuda.byte_launches import as_numbers, gated_in_bytes, rounded_rows
from nai_t5_core.backends.cuda.byte_products import (
    ESTIMATED_FOR_BYTES,
    HOPPER_FOR_BYTES,
    ByteProducts,
    byte_product,
    column_runs,
    unpacked,
)
from nai_t5_core.backends.cuda.byte_weight import ByteWeight, weight_of
from nai_t5_core.backends.cuda.eight_bit_products import EightBitProducts
from nai_t5_core.backends.cuda.int8_products import (
    ESTIMATED_FOR_INT8,
    int8_candidates,
    int8_configurations,
    int8_product,
)
from nai_t5_core.backends.cuda.launches import Watch, add_norm, add_norm_in_form
from nai_t5_core.backends.cuda.measured_card import MeasuredProduct
from nai_t5_core.backends.cuda.products import Configuration
from nai_t5_core.backends.cuda.torch_products import TorchProducts

# float8_e4m3 by the card's own instructions, which the interpreter has but for NaN, or by shifting bits.
CONVERSIONS = (False, True) if not HAS_GPU or torch.cuda.get_device_capability() >= (8, 9) else (False,)
SUMS_IN_FLOAT32 = 1e-6


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def limit(kind: str, dtype: torch.dtype) -> float:
    """Numbers of a byte are exact in every dtype; those of blocks are rounded once."""
    return ONE_ROUNDING[dtype] if kind == "Q8_0" else SUMS_IN_FLOAT32


def products(**how: Any) -> ByteProducts:
    return ByteProducts(TorchProducts(), ESTIMATED_FOR_BYTES, how.pop("converts_float8", False), **how)


# ---------------------------------------------------------------------------------------------------------------------
# Products of few rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 37, 128])
@pytest.mark.parametrize(
    "configuration", [Configuration(16, 32, 1, 2), Configuration(64, 64, 3), Configuration(32, 128, 1)]
)
@pytest.mark.parametrize("converts_float8", CONVERSIONS)
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_bytes_are_multiplied_as_they_are(
    kind: str, rows: int, configuration: Configuration, converts_float8: bool, dtype: torch.dtype
) -> None:
    linear = linear_of(kind, (64, 384), (128, 384))
    exact = exact_weight(linear)
    x = draw(rows, 384, dtype=dtype)
    how = {"converts_float8": converts_float8}
    found = byte_product(x, weight_of(linear), configuration, torch.float32, **how)  # type: ignore[arg-type]
    assert found.shape == (configuration.parts, rows, 192)
    assert error(found.sum(0), x.double().cpu() @ exact.T.cpu()) < limit(kind, dtype)


@pytest.mark.parametrize("kind", ["int8", "Q8_0"])
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_activated_products_are_rounded_once(
    kind: str, rows: int, activation: Activation, is_gated: bool, dtype: torch.dtype
) -> None:
    linear = linear_of(kind, (96, 128), (96, 128))
    exact = draw(rows, 128, dtype=dtype).double() @ exact_weight(linear).T.to(DEVICE)
    gates, up = exact.chunk(2, -1) if is_gated else (exact, 1)
    found = products().activated(draw(rows, 128, dtype=dtype), weight_of(linear), activation, is_gated)
    assert isinstance(found, torch.Tensor) and found.dtype == dtype
    assert error(found, ACTIVATIONS[activation](gates) * up) < 1.5 * ONE_ROUNDING[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(768, 768), (80, 64), (48, 96), (40, 32)])
def test_products_of_every_size_are_right(kind: str, sizes: tuple[int, int]) -> None:
    linear = linear_of(kind, sizes)
    exact, weight = exact_weight(linear).to(DEVICE), weight_of(linear)
    for rows in (2, 130) if sizes[1] < 100 else (2,):
        x = draw(rows, sizes[1], dtype=torch.float16)
        for way in (products(), ByteProducts(TorchProducts(), None, False)):
            summed: Any = way.summed(x, weight)
            total = summed.double().sum(0) if summed.ndim == 3 else summed
            assert error(total, x.double() @ exact.T) < 2 * ONE_ROUNDING[torch.float16]
            assert error(way.plain(x, weight), x.double() @ exact.T) < 2 * ONE_ROUNDING[torch.float16]


def test_every_byte_of_float8_is_its_number() -> None:
    """Each byte by itself, times one; NaN and infinities, of which e4m3 has none, make their column NaN or infinite."""
    every = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        expected = every.view(dtype).double()
        for converts_float8 in CONVERSIONS:
            for place in (0, 31):
                values = torch.zeros(256, 32, dtype=torch.uint8)
                values[:, place] = every
                linear = linear_of("float8 without a scale", (256, 32))
                linear.forms[0].weight.parts["weight"] = values.view(dtype).to(DEVICE)
                weight: Any = weight_of(linear)
                x = torch.ones(1, 32, dtype=torch.float16, device=DEVICE)
                found = byte_product(x, weight, Configuration(16, 32), torch.float32, converts_float8=converts_float8)
                assert torch.equal(found[0, 0].double().cpu().nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))
                plain = unpacked(weight, slice(0, 256), torch.float16, converts_float8)[:, place].double().cpu()
                assert torch.equal(plain.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))


def test_products_that_do_not_fit_are_refused() -> None:
    x = draw(129, 64, dtype=torch.float16)
    for kind, rows, configuration, activation in (
        ("int8", 129, Configuration(16, 32), None),
        ("int8", 5, Configuration(256, 32), None),
        ("int8", 5, Configuration(16, 128), None),
        ("int8", 5, Configuration(16, 32, 2), "relu"),
        ("Q8_0", 5, Configuration(16, 16), None),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            weight: Any = weight_of(linear_of(kind, (128, 64)))
            byte_product(x[:rows], weight, configuration, torch.float16, activation)  # type: ignore[arg-type]


def test_every_kind_of_product_has_configurations_of_every_size() -> None:
    for known in (ESTIMATED_FOR_BYTES, HOPPER_FOR_BYTES):
        assert set(known) == {(kind, rows) for kind in ("plain", "gated", "summed") for rows in (16, 32, 64, 128)}


# ---------------------------------------------------------------------------------------------------------------------
# Products of few rows, both sides in int8
# ---------------------------------------------------------------------------------------------------------------------


def in_int8(*size: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randint(-128, 128, size, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return drawn.to(DEVICE)


def int8_sides(rows: int, columns: int, depth: int) -> tuple[Bytes, ByteWeight, torch.Tensor]:
    """Inputs, a weight, and their product in float64; a part of the depth has the largest numbers that there are."""
    x, weight = in_int8(rows, depth), in_int8(columns, depth, seed=1)
    x[:, : depth // 2], weight[: columns // 2, : depth // 2] = 127, -128
    of_rows, of_columns = draw(rows, seed=2).abs() * 1e-2, draw(columns, seed=3).abs() * depth**-0.5 / 73
    exact = x.double() @ weight.double().T * of_rows.double()[:, None] * of_columns.double()
    return Bytes(x, of_rows, torch.float16), ByteWeight(weight, of_columns), exact


@pytest.mark.parametrize("rows", [1, 16, 37, 64, 101, 128])
@pytest.mark.parametrize(
    "configuration", [Configuration(16, 32, 1, 2), Configuration(64, 64, 3), Configuration(32, 128, 1)]
)
def test_sums_of_int8_are_exact(rows: int, configuration: Configuration) -> None:
    x, weight, exact = int8_sides(rows, 192, 384)
    found = int8_product(x, weight, configuration, torch.float32)
    assert found.shape == (configuration.parts, rows, 192) and found.dtype == torch.float32
    assert error(found.sum(0), exact) < SUMS_IN_FLOAT32
    # In one part, each number is a whole one in float32, times two scales.
    if configuration.parts == 1:
        sums = (x.values.double() @ weight.values.double().T).float()
        assert torch.equal(found[0], sums * weight.scales * x.scales[:, None])


@pytest.mark.parametrize("rows", [3, 40, 128])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_products_of_int8_are_activated_and_rounded_once(
    rows: int, activation: Activation, is_gated: bool, dtype: torch.dtype
) -> None:
    x, weight, exact = int8_sides(rows, 192, 128)
    gates, up = exact.chunk(2, -1) if is_gated else (exact, 1)
    found = int8_product(x, weight, Configuration(32, 64), dtype, activation, is_gated)
    assert found.shape == (1, rows, 96 if is_gated else 192) and found.dtype == dtype
    assert error(found[0], ACTIVATIONS[activation](gates) * up) < 1.5 * ONE_ROUNDING[dtype]


@pytest.mark.parametrize("sizes", [(768, 768), (96, 64), (64, 96), (32, 32), (192, 512)])
@pytest.mark.parametrize("rows", [1, 30, 50, 128])
def test_products_of_int8_of_every_size_are_right(sizes: tuple[int, int], rows: int) -> None:
    """In the configuration that is taken; gating halves the columns."""
    x, weight, exact = int8_sides(rows, *sizes)
    way = EightBitProducts(TorchProducts(), ESTIMATED_FOR_BYTES, False)
    assert error(way.plain(x, weight), exact) < 1.5 * ONE_ROUNDING[torch.float16]
    summed: Any = way.summed(x, weight)
    assert summed.shape[1:] == (rows, sizes[0]) and error(summed.sum(0), exact) < SUMS_IN_FLOAT32
    for is_gated in (False, True):
        gates, up = exact.chunk(2, -1) if is_gated else (exact, 1)
        found: Any = way.activated(x, weight, "silu", is_gated)
        assert found.values.dtype == torch.int8 and found.dtype == torch.float16
        assert_rounded(found, ACTIVATIONS["silu"](gates) * up, 1.1)


def test_a_row_that_is_not_finite_stays_so() -> None:
    """Its bytes are whatever they are; its scale tells."""
    x, weight, exact = int8_sides(20, 64, 64)
    x.scales[7] = float("nan")
    found = int8_product(x, weight, Configuration(32, 32), torch.float32)[0]
    assert found.isnan().all(1).nonzero().flatten().tolist() == [7]
    assert error(found[:7], exact[:7]) < SUMS_IN_FLOAT32


def test_products_of_int8_that_do_not_fit_are_refused() -> None:
    for rows, configuration, activation in (
        (129, Configuration(16, 32), None),
        (5, Configuration(256, 32), None),
        (5, Configuration(16, 128), None),
        (5, Configuration(16, 32, 2), "relu"),
        (5, Configuration(16, 16), None),
    ):
        x, weight, _ = int8_sides(rows, 128, 64)
        with pytest.raises(ValueError, match="does not fit"):
            int8_product(x, weight, configuration, torch.float16, activation)  # type: ignore[arg-type]


def test_every_configuration_for_int8_fits_what_it_is_for() -> None:
    assert set(ESTIMATED_FOR_INT8) == set(ESTIMATED_FOR_BYTES)
    for (kind, rows), known in ESTIMATED_FOR_INT8.items():
        assert known[-1] == Configuration(16, 32, 1, 2), "fits all sizes that are multiples of 32"
        for each in (*known, *int8_candidates(kind, rows)):
            assert each.parts == 1 or kind == "summed"
    times: dict[str, Any] = {"kind": "summed", "microseconds": 1, "by_torch": 2}
    measured = [
        MeasuredProduct(rows=64, way="few rows", configuration=asdict(Configuration(64, 128, 4)), **times),
        MeasuredProduct(rows=16, way="torch", **times),
    ]
    found = int8_configurations(measured)
    assert found["summed", 64] == (Configuration(64, 128, 4), *ESTIMATED_FOR_INT8["summed", 64])
    assert {**found, ("summed", 64): ()} == {**ESTIMATED_FOR_INT8, ("summed", 64): ()}


# ---------------------------------------------------------------------------------------------------------------------
# Unpacking for products of many rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shapes", [((8, 32),), ((13, 288), (21, 288))])
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_weights_are_unpacked_with_one_rounding(kind: str, shapes: Any, dtype: torch.dtype) -> None:
    linear = linear_of(kind, *shapes)
    exact: Any = exact_weight(linear)
    weight: Any = weight_of(linear)
    for some in (slice(0, len(exact)), slice(3, 7), slice(7, len(exact))):
        found = unpacked(weight, some, dtype)
        assert found.dtype == dtype
        assert torch.equal(found.cpu(), exact.cpu()[some].to(dtype)) or error(found, exact[some]) < ONE_ROUNDING[dtype]


@pytest.mark.parametrize("sizes", [(20480, 4096), (12288, 4096), (4096, 10240), (1, 1), (7, 1 << 24)])
def test_little_is_unpacked_at_once(sizes: tuple[int, int]) -> None:
    columns, depth = sizes
    weight = ByteWeight(torch.empty(sizes, dtype=torch.int8, device="meta"), torch.empty(columns, device="meta"))
    runs = list(column_runs(weight))
    assert runs[0].start == 0 and runs[-1].stop == columns
    assert all(run.stop == following.start for run, following in pairwise(runs))
    assert all((run.stop - run.start) * depth <= max(20971520, depth) for run in runs)


def test_products_of_many_rows_are_joined_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nai_t5_core.backends.cuda.byte_products._MOST_UNPACKED", 50 * 64)
    linear = linear_of("Q8_0", (96, 64), (33, 64))
    exact, x = exact_weight(linear), draw(130, 64, dtype=torch.float16)
    weight: Any = weight_of(linear)
    assert len(list(column_runs(weight))) == 3
    assert error(products().plain(x, weight), x.double().cpu() @ exact.T.cpu()) < 2 * ONE_ROUNDING[torch.float16]


# ---------------------------------------------------------------------------------------------------------------------
# Activations in 8 bits
# ---------------------------------------------------------------------------------------------------------------------

# Half a step of 127, and half of the last bit of a number in e4m3.
STEPS = {torch.int8: 0.501 / 127, torch.float8_e4m3fn: 0.0626}


def numbers(found: Bytes) -> torch.Tensor:
    return found.values.double().cpu() * found.scales.double().cpu()[:, None]


def assert_rounded(found: Bytes, exact: torch.Tensor, room: float = 1.0) -> None:
    exact = exact.cpu()
    largest = exact.abs().amax(1, keepdim=True)
    step = STEPS[found.values.dtype]
    # Steps of int8 are even; those of float8 grow with the number, from the smallest on, below which there are few.
    smallest = 2**-6 / 448 * largest
    size = largest if found.values.dtype == torch.int8 else torch.maximum(exact.abs(), smallest)
    assert found.values.shape == exact.shape and found.scales.shape == exact.shape[:1]
    assert ((numbers(found) - exact).abs() <= room * step * size + 1e-30).all()
    values = found.values.float().cpu().abs()
    limit = 127 if found.values.dtype == torch.int8 else 448
    assert values.max() <= limit and (values.amax(1)[largest[:, 0] > 0] >= limit * 0.93).all()


@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize("width", [16, 100, 2560, 40000])
def test_rows_are_rounded_with_a_scale_each(dtype: torch.dtype, width: int) -> None:
    x = draw(5, width, dtype=torch.float16) * torch.tensor([1, 1e-3, 0, 60, 1.0], device=DEVICE)[:, None].half()
    found = rounded_rows(x, dtype, torch.float16)
    assert found.dtype == torch.float16
    assert_rounded(found, x.double())


def test_float8_is_rounded_as_torch_rounds_it() -> None:
    """Numbers near every boundary, with the largest one last, so that the scale is one."""
    numbers = torch.cat((torch.linspace(-448, 448, 4096), torch.logspace(-5, 2, 4095), torch.tensor([448.0])))
    found = rounded_rows(numbers[None].to(DEVICE), torch.float8_e4m3fn, torch.float16)
    assert float(found.scales[0]) == 1
    assert torch.equal(found.raw[0].cpu(), numbers.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("place", [7, 20000, 39999])
def test_the_largest_number_and_faults_of_a_wide_row_are_found_everywhere(place: int) -> None:
    x = draw(3, 40000)
    x[0, place], x[1, place] = 100, float("nan")
    found = rounded_rows(x, torch.int8, torch.float16)
    assert found.scales.isnan().tolist() == [False, True, False]
    assert_rounded(Bytes(found.values[:1], found.scales[:1], found.dtype), x[:1].double())


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", STEPS)
def test_what_is_not_finite_makes_its_row_nan(fault: float, dtype: torch.dtype) -> None:
    x = draw(3, 100)
    x[1, 7] = fault
    joined = torch.cat((x, torch.ones_like(x)), 1)
    for found in (
        rounded_rows(x, dtype, torch.float16),
        gated_in_bytes(joined, "silu", True, dtype, torch.float16),
        add_norm_in_form(x.clone(), None, 1.0, 1e-6, torch.float16, dtype, None),
    ):
        assert isinstance(found, Bytes)
        assert found.scales.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("parts", [None, 1, 3, "sums"])
@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize("has_weight", [False, True])
def test_norms_give_bytes_of_sums(parts: Any, dtype: torch.dtype, has_weight: bool) -> None:
    rows, width = 5, 100
    residual, delta, added = draw(rows, width) * 7, None, torch.zeros(rows, width, dtype=torch.float64, device=DEVICE)
    if parts == "sums":
        values = (draw(rows, width, seed=1) * 1e5).int()
        delta = Sums(values, draw(rows, seed=2).abs() * 1e-3, draw(width, seed=3).abs() * 1e-2)
        added = values.double() * delta.row_scales.double()[:, None] * delta.column_scales.double()
    elif parts is not None:
        given = draw(parts, rows, width, seed=1, dtype=torch.float16)
        delta, added = (given[0] if parts == 1 else given), given.double().sum(0)
    exact = residual.double() + 0.25 * added
    weight = draw(width, seed=4).abs() + 0.5 if has_weight else None
    again, watched = residual.clone(), residual.clone()
    found = add_norm_in_form(residual, delta, 0.25, 1e-6, torch.float16, dtype, weight)
    assert isinstance(found, Bytes) and found.dtype == torch.float16
    assert error(residual, exact) < 1e-6
    normed = torch.nn.functional.rms_norm(exact, (width,), None if weight is None else weight.double(), 1e-6)
    assert_rounded(found, normed)
    plain = add_norm_in_form(again, delta, 0.25, 1e-6, torch.float16, None, weight)
    assert isinstance(plain, torch.Tensor) and error(plain, normed) < ONE_ROUNDING[torch.float16]
    finite = torch.ones(1, dtype=torch.int32, device=DEVICE)
    count = torch.tensor([rows], dtype=torch.int32, device=DEVICE)
    assert torch.equal(add_norm(watched, delta, 0.25, 1e-6, torch.float16, weight, Watch(finite, count)), plain)
    assert int(finite) == 1


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("of_sums", [False, True])
@pytest.mark.parametrize("dtype", STEPS)
def test_gating_gives_bytes(activation: Activation, is_gated: bool, of_sums: bool, dtype: torch.dtype) -> None:
    for rows, width in ((1, 16), (3, 1100)):
        columns = width * (2 if is_gated else 1)
        joined: Any = draw(rows, columns, dtype=torch.bfloat16) * 3
        exact = joined.double()
        if of_sums:
            values = (draw(rows, columns) * 1000).int()
            joined = Sums(values, draw(rows, seed=2).abs() * 1e-2, draw(columns, seed=3).abs())
            exact = values.double() * joined.row_scales.double()[:, None] * joined.column_scales.double()
        gates, up = exact.chunk(2, -1) if is_gated else (exact, 1)
        found = gated_in_bytes(joined, activation, is_gated, dtype, torch.float16)
        assert_rounded(found, ACTIVATIONS[activation](gates) * up)


def test_sums_become_numbers() -> None:
    values = (draw(3, 1100) * 1e6).int()
    sums = Sums(values, draw(3, seed=1), draw(1100, seed=2) * 1e-5)
    exact = values.double() * sums.row_scales.double()[:, None] * sums.column_scales.double()
    assert error(as_numbers(sums, torch.float16), exact) < ONE_ROUNDING[torch.float16]
