"""Small encoders with weights in 8 bits, by the kernels for CUDA: as exact as their bytes, laid out and moved."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from byte_toys import CONFIGS, KINDS, exact_of_quantised, linear_of, quantised_stack
from conftest import build_stack, padding_mask, random_state
from cuda_toys import DEVICE, HERE, ONE_ROUNDING, PRODUCT_DTYPES, draw, error, exact_of, stack_of
from torch import Tensor

from nai_t5_core.backends.choose import quantize_int8, why_not_int8
from nai_t5_core.backends.cuda import int8
from nai_t5_core.backends.cuda.device_refusals import missing_triton
from nai_t5_core.backends.cuda.encoder import cuda_encoder
from nai_t5_core.backends.cuda.int8 import quantise_block, quantise_stack
from nai_t5_core.backends.cuda.refusals import refuses
from nai_t5_core.backends.cuda.runner import CudaRunner
from nai_t5_core.backends.quantised.projections import QuantisedLinear
from nai_t5_core.bench.parity import difference
from nai_t5_core.facts.scales import LayerScales, StackScales

if missing := missing_triton():
    pytest.skip(missing, allow_module_level=True)

from nai_t5_core.backends.cuda.byte_products import ESTIMATED_FOR_BYTES
from nai_t5_core.backends.cuda.byte_weight import ByteWeight, RowScaled, lay_out, weight_of
from nai_t5_core.backends.cuda.eight_bit_products import AskedEightBitProducts, EightBitProducts
from nai_t5_core.backends.cuda.torch_products import TorchProducts

STACKS = ("int8 by us", *KINDS)
IDS = torch.randint(0, 96, (4, 11), generator=torch.Generator().manual_seed(5))
MASK = padding_mask([0, 11, 11, 4], 11)
LONG = torch.randint(0, 96, (1, 140), generator=torch.Generator().manual_seed(6))
ROWS = torch.randint(0, 96, (1, 24), generator=torch.Generator().manual_seed(7))
# Those of the graph for 256.
MANY_ROWS = torch.randint(0, 96, (1, 132), generator=torch.Generator().manual_seed(8))
SCALES = StackScales((LayerScales(1, 0.5, 0.25), LayerScales(0.5, 0.25, 1), LayerScales(0.125, 0.5, 0.5)), 0.5)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def unpacked_error(kind: str, exact: Any, dtype: torch.dtype, ids: Tensor, mask: Tensor | None, **how: Any) -> float:
    """What an encoder of the same numbers in the compute dtype is off by, which rounds weights as well."""
    return error(copy.deepcopy(exact).to(dtype)(ids, mask, **how), exact(ids, mask, **how))


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("config", ["v1.0", "v1.1", "umt5"])
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_an_encoder_is_as_exact_as_its_unpacked_weights(kind: str, config: str, dtype: torch.dtype) -> None:
    stack = quantised_stack(kind, CONFIGS[config], dtype)
    exact = exact_of_quantised(stack)
    found = cuda_encoder(stack, eager=True).encode(IDS, MASK, "skip")
    assert int(found.finite) == 1
    expected = exact(IDS, MASK, padding="skip")
    assert error(found.hidden, expected) < 1.3 * unpacked_error(kind, exact, dtype, IDS, MASK, padding="skip")


@pytest.mark.parametrize(("kind", "products"), [*(("Q8_0", products) for products in HERE), ("int8 by us", "auto")])
def test_scaled_encoders_by_every_choice_of_products(kind: str, products: Any) -> None:
    stack = quantised_stack(kind, scales=SCALES)
    exact = exact_of_quantised(stack)
    found = cuda_encoder(stack, eager=True, products=products)(IDS, MASK, "trim", 2)
    how: dict[str, Any] = {"padding": "trim", "extra_pad": 2}
    assert error(found, exact(IDS, MASK, **how)) < 1.3 * unpacked_error(kind, exact, torch.float16, IDS, MASK, **how)


@pytest.mark.parametrize("kind", ["int8 by us", "float8 by row", "Q8_0"])
def test_a_long_row_is_computed_from_unpacked_weights(kind: str) -> None:
    stack = quantised_stack(kind)
    exact = exact_of_quantised(stack)
    found = cuda_encoder(stack, eager=True)(LONG)
    assert error(found, exact(LONG)) < 1.3 * unpacked_error(kind, exact, torch.float16, LONG, None)


def eight_bits(stack: Any, converts_float8: bool = True, made_by: Any = EightBitProducts, least_rows: int = 32) -> Any:
    """From the rows on that a graph for 32 computes."""
    encoder = cuda_encoder(stack, eager=True, products="8-bit")
    encoder._products = made_by(TorchProducts(), ESTIMATED_FOR_BYTES, converts_float8, least_rows=least_rows)
    return encoder


def test_which_rows_are_in_8_bits() -> None:
    """As many as a graph would compute; float8 from 256 on."""
    named: Any = cuda_encoder(quantised_stack("int8"), eager=True, products="8-bit")._products

    def rows_in_8_bits(products: Any, dtype: torch.dtype) -> list[int]:
        found = {rows: products.input_bytes(RowScaled(dtype), rows) for rows in (1, 32, 33, 128, 129, 256, 2000)}
        assert set(found.values()) <= {None, dtype}
        return [rows for rows, each in found.items() if each is not None]

    every = [1, 32, 33, 128, 129, 256, 2000]
    assert rows_in_8_bits(named, torch.int8) == every
    assert rows_in_8_bits(named, torch.float8_e5m2) == []
    assert rows_in_8_bits(named, torch.float8_e4m3fn) == [], "this card multiplies no float8"
    some, how = EightBitProducts, (TorchProducts(), ESTIMATED_FOR_BYTES, True)
    assert rows_in_8_bits(some(*how, least_rows=64), torch.int8) == every[2:]
    assert rows_in_8_bits(some(*how, least_rows=64), torch.float8_e4m3fn) == every[4:]
    assert rows_in_8_bits(some(*how, least_rows=512), torch.float8_e4m3fn) == every[6:]
    assert named.input_bytes(None, 256) is None
    as_int8 = RowScaled(torch.int8)
    for kind, shape, expected in (("int8", (96, 64), as_int8), ("int8", (48, 64), None), ("Q8_0", (96, 64), None)):
        weight: Any = weight_of(linear_of(kind, shape))
        assert weight.row_scaled == expected


def test_which_launches_of_int8_overlap() -> None:
    how = (TorchProducts(), ESTIMATED_FOR_BYTES, True)
    found = EightBitProducts(*how, int8_overlapping_rows=1000)
    assert [found.overlaps(rows, True, True) for rows in (1, 128, 129)] == [True, True, False]
    assert not found.overlaps(1, True, False), "weights alone"
    assert not EightBitProducts(*how).overlaps(1, True, True)


@pytest.mark.parametrize("kind", ["int8 by us", "int8", "float8 by row"])
def test_inputs_are_in_8_bits_by_themselves_where_int8_was_asked_for(kind: str) -> None:
    """A file in 8 bits is computed from its numbers."""
    stack = quantised_stack(kind)
    for rows in (ROWS, MANY_ROWS) if kind != "float8 by row" else (MANY_ROWS,):
        found = eight_bits(stack, made_by=AskedEightBitProducts)(rows)
        asked, exact = eight_bits(stack)(rows), cuda_encoder(stack, eager=True)(rows)
        assert not torch.equal(asked, exact)
        assert torch.equal(found, asked if kind == "int8 by us" else exact)


# What rounding activations costs, as the differences' norm relative to the result's.
COSTS = {"int8 by us": 0.02, "int8": 0.03, "float8 by row": 0.2, "float8": 0.2}


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize("config", ["v1.0", "v1.1"])
def test_both_sides_in_8_bits(kind: str, config: str) -> None:
    stack = quantised_stack(kind, CONFIGS[config], scales=SCALES if config == "v1.1" else None)
    for rows in (MANY_ROWS,) if "float8" in kind else (ROWS, MANY_ROWS):
        exact = exact_of_quantised(stack)(rows)
        rounded, plain = eight_bits(stack)(rows), cuda_encoder(stack, eager=True)(rows)
        assert error(plain, exact) < 0.005 < error(rounded, exact) < COSTS[kind], "activations are not in 8 bits"
    assert torch.equal(eight_bits(stack)(ROWS[:, :16]), cuda_encoder(stack, eager=True)(ROWS[:, :16]))


def test_few_and_many_rows_lose_as_much() -> None:
    """By our kernel and by torch."""
    stack = quantised_stack("int8 by us")
    exact = exact_of_quantised(stack)
    few, many = (error(eight_bits(stack)(rows), exact(rows)) for rows in (MANY_ROWS[:, :128], MANY_ROWS))
    assert 0.9 * many < few < 1.1 * many


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_several_prompts_in_8_bits(dtype: torch.dtype) -> None:
    stack = quantised_stack("int8 by us", dtype=dtype)
    expected = exact_of_quantised(stack)(IDS, MASK, padding="skip")
    found = eight_bits(stack, least_rows=1).encode(IDS, MASK, "skip")
    assert int(found.finite) == 1 and found.hidden.dtype == dtype
    assert error(found.hidden, expected) < 2 * COSTS["int8 by us"]


@pytest.mark.parametrize("has_outliers", [False, True])
def test_8_bits_lose_no_more_than_the_int8_of_the_cpu(has_outliers: bool) -> None:
    """By the quantiles that ``nai-t5 parity`` prints, with both sides in 8 bits, and less with weights alone."""
    config = CONFIGS["v1.1"].encoder_only()
    state = random_state(config)
    if has_outliers:
        for name in state:
            if "layer_norm" in name and "final" not in name:
                state[name][::17] *= 20
    on_cpu: Any = build_stack(config, state)
    if reason := why_not_int8(on_cpu):
        pytest.skip(reason)
    exact = build_stack(config, state, torch.float64)(ROWS)[0]
    theirs = difference("int8", "float32", quantize_int8(on_cpu)(ROWS)[0], exact)
    ours: Any = build_stack(config, state, torch.float16)
    for block in ours.encoder.block:
        quantise_block(block, torch.float16, torch.device(DEVICE))
    ours = ours.to(DEVICE)
    both = difference("int8", "float16", eight_bits(ours)(ROWS)[0].float().cpu(), exact)
    weights = difference("int8", "float16", cuda_encoder(ours, eager=True)(ROWS)[0].float().cpu(), exact)
    for quantile, found in theirs.quantiles.items():
        assert both.quantiles[quantile] < 1.15 * found
        assert weights.quantiles[quantile] < found


@pytest.mark.parametrize("kind", ["Q8_0", "e5m2", "float8 by row", None])
def test_what_has_no_products_in_8_bits_is_computed_as_ever(kind: str | None) -> None:
    """Blocks of scales, e5m2, float8 on a card that does not multiply it, and weights in 16 bits."""
    stack = stack_of(CONFIGS["v1.1"]) if kind is None else quantised_stack(kind)
    for rows in (ROWS, MANY_ROWS):
        assert torch.equal(eight_bits(stack, converts_float8=False)(rows), cuda_encoder(stack, eager=True)(rows))


def test_a_layer_of_several_kinds_is_computed_in_16_bits() -> None:
    stack, other = quantised_stack("int8"), quantised_stack("Q8_0")
    stack.encoder.block[1].layer[1].DenseReluDense.wo = other.encoder.block[1].layer[1].DenseReluDense.wo
    exact = exact_of_quantised(stack)(ROWS)
    assert 0.005 < error(eight_bits(stack)(ROWS), exact) < COSTS["int8"]
    assert error(cuda_encoder(stack, eager=True)(ROWS), exact) < 0.005


# ---------------------------------------------------------------------------------------------------------------------
# How projections are laid out
# ---------------------------------------------------------------------------------------------------------------------


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_laying_out_changes_no_number_and_the_way_back_no_bit(kind: str) -> None:
    linear = linear_of(kind, (48, 64), (80, 64), norm=True)
    before, numbers, size = linear.forms, linear.plain(), sum(form.weight.nbytes for form in linear.forms)
    lay_out(linear)
    laid_out = linear.forms
    assert torch.equal(linear.plain(), numbers)
    assert address(laid_out[0].joined) == address(laid_out[1].weight.parts["weight"])
    assert sum(form.weight.nbytes for form in laid_out) == size
    lay_out(linear)
    assert linear.forms is laid_out
    for form, original in zip(laid_out, before, strict=True):
        back = form._with(form.weight)
        assert back.weight.kind == original.weight.kind and back.scale == original.scale
        assert back.weight.parts.keys() == original.weight.parts.keys()
        for name, part in original.weight.parts.items():
            assert torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (back.weight.parts[name], part)))


def test_what_was_laid_out_is_kept_once() -> None:
    """No tensor of a projection as it was in its file is left."""
    linear = linear_of("Q8_0", (48, 64), (80, 64))
    weight: Any = weight_of(linear)
    tensors = [part for form in linear.forms for part in form.weight.parts.values()]
    assert len(set(map(address, (*tensors, weight.values, weight.block_scales)))) == 2


@pytest.mark.parametrize("kind", ["int8", "Q8_0", "float8"])
def test_copies_pickles_and_casts_are_laid_out_again(kind: str) -> None:
    linear = linear_of(kind, (48, 64), (80, 64), norm=True)
    x = draw(5, 64, dtype=torch.float16)
    lay_out(linear)
    expected = linear(x)
    torch.save(linear, pickled := io.BytesIO())
    assert pickled.tell() < 1.2 * sum(form.weight.nbytes for form in linear.forms) + 8192
    pickled.seek(0)
    loaded = torch.load(pickled, weights_only=False)
    for other in (copy.deepcopy(linear), loaded, copy.deepcopy(linear).bfloat16().half()):
        assert torch.equal(other(x), expected)
        lay_out(other)
        assert all(address(form.joined) == address(form.weight.parts["weight"]) for form in other.forms)


class OutOfRoomError(RuntimeError):
    pass


def failing_at(number: int, call: Any) -> Any:
    calls = iter(range(1000))

    def failing(*given: Any) -> Any:
        if next(calls) == number:
            raise OutOfRoomError
        return call(*given)

    return failing


@pytest.mark.parametrize("fault", ["a projection", "the rest"])
def test_what_cannot_be_quantised_on_another_device_is_what_it_was(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack: Any = stack_of(CONFIGS["v1.1"], device="cpu")
    expected, modules = stack(IDS, MASK), list(stack.modules())
    runners = [block.runner for block in stack.encoder.block]
    with monkeypatch.context() as patch, pytest.raises(OutOfRoomError):
        if fault == "a projection":
            patch.setattr(int8, "_held", failing_at(5, int8._held))
        else:
            patch.setattr(torch.nn.Embedding, "_apply", failing_at(0, torch.nn.Embedding._apply))
        quantise_stack(stack, torch.device("meta"))
    assert all(a is b for a, b in zip(stack.modules(), modules, strict=True))
    assert [block.runner for block in stack.encoder.block] == runners
    assert torch.equal(stack(IDS, MASK), expected)


def test_what_cannot_be_quantised_where_it_is_computes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no room for all weights in 16 and in 8 bits."""
    stack: Any = stack_of(CONFIGS["v1.1"])
    exact = exact_of(CONFIGS["v1.1"])(IDS)
    with monkeypatch.context() as patch, pytest.raises(OutOfRoomError):
        patch.setattr(int8, "_held", failing_at(5, int8._held))
        quantise_stack(stack, stack.device)
    assert sum(isinstance(module, QuantisedLinear) for module in stack.modules()) == 5
    for found in (stack(IDS), cuda_encoder(stack, eager=True)(IDS)):
        assert error(found, exact) < 0.02
    quantise_stack(stack, stack.device)
    assert sum(isinstance(module, QuantisedLinear) for module in stack.modules()) == 12
    assert error(cuda_encoder(stack, eager=True)(IDS), exact) < 0.03


def test_a_norm_of_large_weights_stays_in_float16() -> None:
    """Up to the root of 64 times the weight of a norm: 8 · 30000 exceeds float16."""
    linear = linear_of("int8", (48, 64), norm=True)
    form = linear.forms[0]
    linear.forms = (type(form)(form.weight, form.columns * 3e4, form.scale),)
    exact = linear.forms[0].original().double()
    weight: Any = weight_of(linear)
    assert float(weight.norm.max()) * 8 <= 2**15
    assert error(weight.values.double() * weight.scales.double()[:, None] * weight.norm.double(), exact) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what is seen
# ---------------------------------------------------------------------------------------------------------------------


def test_changed_scales_and_replaced_projections_are_seen() -> None:
    stack: Any = quantised_stack("int8 by us")
    encoder = cuda_encoder(stack, eager=True)
    encoder(IDS, MASK)
    stack.encoder.block[0].layer[1].DenseReluDense.wi.multiply_rows(3.0, 0)
    other: Any = quantised_stack("Q8_0")
    stack.encoder.block[1].layer[0].SelfAttention.o = other.encoder.block[1].layer[0].SelfAttention.o
    exact = exact_of_quantised(stack)
    assert error(encoder(IDS, MASK), exact(IDS, MASK)) < 1.3 * unpacked_error("", exact, torch.float16, IDS, MASK)


def test_kinds_that_are_not_read_are_named() -> None:
    from nai_t5_core.backends.quantised.packing import pack
    from nai_t5_core.backends.quantised.projections import QuantisedForm, QuantisedLinear

    stack: Any = quantised_stack("int8")
    dense = stack.encoder.block[1].layer[1].DenseReluDense
    with torch.no_grad():
        forms = [QuantisedForm(pack(torch.randn(64, 256), "q4_k")).to(torch.device(DEVICE))]
    dense.wo = QuantisedLinear(forms, torch.float16)
    assert refuses(stack) == "a projection is of kind Q4_K, which is unpacked in every call"
    kinds = linear_of("int8", (48, 64)).forms + linear_of("Q8_0", (80, 64)).forms
    dense.wo = QuantisedLinear(kinds, torch.float16)
    assert refuses(stack) == "a projection is of several kinds: int8, Q8_0"


@pytest.mark.parametrize(("kind", "words"), [("int8 by us", "int8"), ("Q8_0", "Q8_0"), ("float8", "float8_e4m3fn")])
def test_who_computes_is_told(kind: str, words: str) -> None:
    stack = quantised_stack(kind)
    stack.runner = CudaRunner(eager=True, kinds=[words])
    assert stack.describe_attention() == f"auto: kernels for CUDA, {words} weights"
    found = stack(IDS, MASK)
    assert torch.equal(found, cuda_encoder(stack, eager=True)(IDS, MASK))


@pytest.mark.parametrize("kind", STACKS)
def test_without_the_kernels_the_modules_compute_from_the_same_bytes(kind: str) -> None:
    stack: Any = quantised_stack(kind)
    cuda_encoder(stack, eager=True)(IDS, MASK)
    exact = exact_of_quantised(stack)
    for block in stack.encoder.block:
        block.runner = None
    assert error(stack(IDS, MASK), exact(IDS, MASK)) < 1.3 * unpacked_error(kind, exact, torch.float16, IDS, MASK)


def test_weights_of_other_kinds_are_as_they_were() -> None:
    stack: Any = stack_of(CONFIGS["v1.1"])
    linear = stack.encoder.block[0].layer[0].SelfAttention.o
    assert weight_of(linear) is linear.weight
    assert not isinstance(weight_of(linear), ByteWeight)
    exact = exact_of(CONFIGS["v1.1"])(IDS)
    assert error(cuda_encoder(stack, eager=True)(IDS), exact) < 5 * ONE_ROUNDING[torch.float16]
