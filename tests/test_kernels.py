"""The kernels for every instruction set: each against the same in float32, and a whole encoder against float64."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY_CONFIGS, build_stack, every_set, needs_kernels, padding_mask, random_state, set_param
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nai_t5_core.backends.choose import prepack, quantize_int8, run_in_place
from nai_t5_core.backends.kernels import build
from nai_t5_core.backends.kernels.calls import (
    add_product,
    attention,
    counted,
    encode_block,
    multiply_in_registers,
    normed_product,
)
from nai_t5_core.backends.kernels.pieces import WEIGHT_FORMATS
from nai_t5_core.backends.kernels.runners import KernelsOnPanels, refuses_in_place
from nai_t5_core.backends.kernels.sets import SETS, InstructionSet
from nai_t5_core.backends.kernels.weights import KernelWeight
from nai_t5_core.backends.products import OneDNNRunner
from nai_t5_core.facts.config import Activation, T5Config
from nai_t5_core.model.attention import position_bias
from nai_t5_core.model.encoder import LAYOUTS, Layout, T5EncoderStack
from nai_t5_core.model.layers import CastingOps
from nai_t5_core.model.packing import PADDING_POLICIES, PaddingPolicy


@pytest.fixture(autouse=True)
def kernels_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a processor has something better, which is nothing to whether they are right."""
    flags = build._processor_flags() - {"amx_bf16"}
    monkeypatch.setattr(build, "_processor_flags", lambda: flags)


# One rounding, of the largest number, and sums in another order.
ONE_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 1e-5}
ONE_ROUNDING[torch.float16] = 2.0**-11

# What activations are stored in.
computing = pytest.mark.parametrize(
    ("instructions", "dtype"),
    [
        set_param(instructions, dtype, name=f"-{dtype}")
        for instructions in SETS
        for dtype in dict.fromkeys(instructions.stored.values())
    ],
)
# What a model is in.
encoding = pytest.mark.parametrize(
    ("instructions", "dtype"),
    [set_param(instructions, dtype, name=f"-{dtype}") for instructions in SETS for dtype in instructions.stored],
)

# Rows below, at and above a tile; sizes with and without a rest beyond whole panels and registers.
ROWS = (1, 5, 12, 13, 37)
SIZES = ((64, 80), (80, 64), (128, 96), (32, 6))


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found.float() - expected).abs().max() / expected.abs().max())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def normed(residual: Tensor, norm: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(residual, residual.shape[-1:], norm, 1e-6).to(dtype).float()


@needs_kernels
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("depth", "columns"), SIZES)
@pytest.mark.parametrize("given", WEIGHT_FORMATS)
@computing
def test_products_equal_those_in_float32(
    rows: int, depth: int, columns: int, given: torch.dtype, instructions: InstructionSet, dtype: torch.dtype
) -> None:
    weight = (draw(columns, depth) * depth**-0.5).to(given)
    kept = instructions.kept(given, dtype)
    exact = weight.to(kept).float()
    residual, norm = draw(rows, depth, seed=1) * 7, draw(depth, seed=2).abs() + 0.5
    plain = KernelWeight.plain(weight, dtype, instructions=instructions)
    x, addend = draw(rows, depth, seed=3).to(dtype), draw(rows, columns, seed=4)
    for ours in (plain, plain.in_panels()):
        for ones_or_norm in (None, norm):
            found = normed_product(residual, ones_or_norm, 1e-6, ours)
            assert found.dtype == dtype
            assert error(found, normed(residual, ones_or_norm, dtype) @ exact.T) < ONE_ROUNDING[dtype]
        total = addend.clone()
        add_product(x, ours, total)
        assert error(total, addend + x.float() @ exact.T) < 1e-5
    assert torch.equal(plain.in_panels().original(), weight.to(kept))
    # Fewer bits than activations have are kept as they are.
    assert kept == dtype or (kept.itemsize < dtype.itemsize and (given.itemsize == 1 or kept == given))


@every_set
def test_long_sums_in_float32_are_no_less_exact_than_torchs(instructions: InstructionSet) -> None:
    weight, x = draw(64, 4000) * 4000**-0.5, draw(50, 4000, seed=1)
    exact = x.double() @ weight.double().T
    plain = KernelWeight.plain(weight, torch.float32, instructions=instructions)
    add_product(x, plain, found := torch.zeros(50, 64))
    assert (found - exact).abs().mean() < 1.2 * (F.linear(x, weight) - exact).abs().mean()
    # Keys that all have the same weight, so that values are all that is summed.
    projected = draw(3000, 3 * 64, seed=2)
    projected[:, :128] = 0
    documents = torch.tensor([(0, 3000, 0, 3000)])
    values = attention(projected, 1, documents, torch.zeros(1, 257), 1.0, instructions)[0]
    mean = projected[:, 128:].double().mean(dim=0)
    assert (values - mean).abs().mean() < 1.2 * (torch.full((3000,), 1 / 3000) @ projected[:, 128:] - mean).abs().mean()


@every_set
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_number_of_float8_is_read_exactly(dtype: torch.dtype, instructions: InstructionSet) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype)
    weight = torch.zeros(256, 256, dtype=torch.uint8).view(dtype)
    weight[:, 0] = numbers
    plain = KernelWeight.plain(weight, torch.float32, instructions=instructions)
    found = plain.in_panels().original()[:, 0].float()
    assert torch.equal(found.nan_to_num(1e9), numbers.float().nan_to_num(1e9))
    assert torch.equal(found.signbit() | found.isnan(), numbers.float().signbit() | found.isnan())


def in_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, and what a unit of each row is worth."""
    unit = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    return (x / unit).round(), unit


@needs_kernels
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("depth", "columns"), [(64, 80), (80, 64), (128, 96), (36, 6)])
@pytest.mark.parametrize("is_gated", [False, True])
@computing
def test_products_in_8_bits_are_exact_sums(
    rows: int, depth: int, columns: int, is_gated: bool, instructions: InstructionSet, dtype: torch.dtype
) -> None:
    """Of whole numbers, two of which in a row may be one off: halves go either way, depending on the order of sums."""
    values, unit = in_bytes(draw(columns, depth))
    weight = KernelWeight.plain(values.to(torch.int8), dtype, is_gated, unit[:, 0], instructions).in_panels()
    exact = (values * unit).double()

    def product(x: Tensor) -> tuple[Tensor, float]:
        numbers, row_unit = in_bytes(x)
        return ((numbers * row_unit).double() @ exact.T).float(), 2 * float(row_unit.max() * exact.abs().max())

    residual, norm = draw(rows, depth, seed=1) * 7, draw(depth, seed=2).abs() + 0.5
    residual[-1] = 0
    for ones_or_norm in (None, norm):
        expected, bound = product(F.rms_norm(residual, (depth,), ones_or_norm, 1e-6))
        if is_gated:
            gate, up = expected.chunk(2, dim=-1)
            expected, bound = gate * up, bound * 2 * float(expected.abs().max())
        found = normed_product(residual, ones_or_norm, 1e-6, weight)
        assert found.dtype == dtype and not found[-1].any()
        assert float((found - expected).abs().max()) <= bound + ONE_ROUNDING[dtype] * float(expected.abs().max())
    if not is_gated:
        x, total = draw(rows, depth, seed=3).to(dtype), draw(rows, columns, seed=4)
        expected, bound = product(x.float())
        expected += total
        add_product(x, weight, total)
        assert float((total - expected).abs().max()) <= bound + 1e-5 * float(expected.abs().max())
    assert torch.equal(weight.original(), values.to(torch.int8))


FUNCTIONS: dict[Activation | None, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    None: lambda x: x,
}


@needs_kernels
@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("is_gated", [False, True])
@computing
def test_activation_and_gating_are_rounded_once(
    activation: Activation | None, is_gated: bool, instructions: InstructionSet, dtype: torch.dtype
) -> None:
    weight, residual = (draw(96, 64) * 0.5).to(dtype), draw(13, 64, seed=1)
    product = normed(residual, None, dtype) @ weight.float().T
    gate, up = product.chunk(2, dim=-1)
    function = FUNCTIONS[activation]
    expected = function(gate) * up if is_gated else function(product)
    plain = KernelWeight.plain(weight, dtype, is_gated, instructions=instructions)
    for ours in (plain, plain.in_panels()):
        assert error(normed_product(residual, None, 1e-6, ours, activation), expected) < ONE_ROUNDING[dtype]
    assert torch.equal(plain.in_panels().original(), weight)


@every_set
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_functions_hold_over_all_of_float32(activation: Activation | None, instructions: InstructionSet) -> None:
    """A norm's weight brings any number into the row, which is ones, and the identity brings it out."""
    values = torch.cat([torch.linspace(-110, 110, 4000), torch.tensor([-3e38, -1e-3, -1e-30, 0, 1e-30, 1e-3, 3e38])])
    weight = KernelWeight.plain(torch.eye(len(values) + 1), torch.float32, instructions=instructions)
    numbers = torch.cat([values, values[:1]])
    found = normed_product(torch.ones(1, len(numbers)), numbers, 0.0, weight, activation)[0]
    expected = FUNCTIONS[activation](numbers.double()).float()
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-14)


@needs_kernels
@pytest.mark.parametrize(("heads", "size"), [(4, 16), (3, 64), (2, 128), (2, 6)])
@pytest.mark.parametrize(
    "documents",
    [
        [(0, 1, 0, 1)],
        [(0, 7, 0, 7)],
        [(0, 33, 0, 20), (33, 5, 2, 3), (38, 100, 0, 100)],
        [(0, 300, 0, 300)],
    ],
)
@computing
def test_attention_equals_that_in_float32(
    heads: int,
    size: int,
    documents: list[tuple[int, int, int, int]],
    instructions: InstructionSet,
    dtype: torch.dtype,
) -> None:
    tokens = sum(rows for _, rows, _, _ in documents)
    projected, table = draw(tokens, 3 * heads * size).to(dtype), draw(heads, 257, seed=1)
    found = attention(projected, heads, torch.tensor(documents), table, 0.5, instructions)
    queries, keys, values = projected.float().unflatten(-1, (3, heads, size)).permute(1, 2, 0, 3)
    for start, rows, first_key, count in documents:
        seen = slice(start + first_key, start + first_key + count)
        bias = position_bias(table, rows)[:, :, first_key : first_key + count]
        weights = (queries[:, start : start + rows] @ keys[:, seen].mT * 0.5 + bias).softmax(-1)
        expected = (weights @ values[:, seen]).transpose(0, 1).flatten(1)
        # The weights are rounded as well.
        assert error(found[start : start + rows], expected) < 2 * ONE_ROUNDING[dtype]


@computing
def test_what_is_not_a_number_is_not_lost(instructions: InstructionSet, dtype: torch.dtype) -> None:
    """The guard looks for it at the end of the encoder."""
    plain = KernelWeight.plain(draw(32, 32), dtype, instructions=instructions)
    ones = torch.ones(32, 32, dtype=torch.int8)
    in_8_bits = KernelWeight.plain(ones, dtype, scales=torch.ones(32), instructions=instructions).in_panels()
    residual = draw(3, 32)
    residual[1, 5] = float("nan")
    for weight in (plain, in_8_bits):
        for activation in FUNCTIONS:
            found = normed_product(residual, None, 1e-6, weight, activation)
            assert found[1].isnan().all() and found[[0, 2]].isfinite().all()
        add_product(residual.to(dtype), weight, total := torch.zeros(3, 32))
        assert total[1].isnan().all() and total[[0, 2]].isfinite().all()
    projected = draw(40, 3 * 32).to(dtype)
    projected[30, 40] = float("nan")  # a key that all queries of its document see
    documents = torch.tensor([(0, 20, 0, 20), (20, 20, 0, 20)])
    found = attention(projected, 1, documents, torch.zeros(1, 257), 1.0, instructions)
    assert found[20:].isnan().all() and found[:20].isfinite().all()


def block_weights(
    is_gated: bool, in_8_bits: bool, dtype: torch.dtype, instructions: InstructionSet | None = None
) -> list[KernelWeight]:
    """Of 3 heads of 16, d_model 40 and d_ff 56."""
    shapes = [(144, 40), (40, 48), (112 if is_gated else 56, 40), (40, 56)]
    weights = []
    for number, (columns, depth) in enumerate(shapes):
        weight, unit = draw(columns, depth, seed=number) * depth**-0.5, None
        if in_8_bits:
            weight, unit = in_bytes(weight)
        kept = weight.to(torch.int8 if in_8_bits else dtype)
        scales = None if unit is None else unit[:, 0]
        plain = KernelWeight.plain(kept, dtype, is_gated and number == 2, scales, instructions)
        weights.append(plain.in_panels())
    return weights


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("in_8_bits", [False, True])
@pytest.mark.parametrize("has_norms", [False, True])
@computing
def test_a_block_is_its_parts(
    is_gated: bool, in_8_bits: bool, has_norms: bool, instructions: InstructionSet, dtype: torch.dtype
) -> None:
    weights = block_weights(is_gated, in_8_bits, dtype, instructions)
    norms = (draw(40, seed=5).abs(), draw(40, seed=6).abs()) if has_norms else (None, None)
    documents, table = torch.tensor([(0, 9, 0, 9), (9, 21, 2, 15)]), draw(3, 257, seed=7)
    residual = draw(30, 40, seed=8)
    found, expected = residual.clone(), residual.clone()
    with counted() as whole:
        encode_block(found, weights, norms, 3, 1e-6, "gelu_new", documents, table, 0.5)
    qkv, o, inner, wo = weights
    with counted() as parts:
        projected = normed_product(expected, norms[0], 1e-6, qkv)
        add_product(attention(projected, 3, documents, table, 0.5, instructions), o, expected)
        add_product(normed_product(expected, norms[1], 1e-6, inner, "gelu_new"), wo, expected)
    assert torch.equal(found, expected) and not torch.equal(found, residual)
    assert whole == parts and whole.flops > 0


@needs_kernels
def test_parts_that_make_no_block_are_refused() -> None:
    weights = block_weights(True, False, torch.float32)
    arguments = ((None, None), 3, 1e-6, "relu", torch.tensor([(0, 2, 0, 2)]), torch.zeros(3, 257), 1.0)
    with pytest.raises(ValueError, match=r"3 heads do not fit each other; they are \[\(144, 40\), \(40, 48\), "):
        encode_block(torch.zeros(2, 40), [*weights[:3], weights[1]], *arguments)
    with pytest.raises(ValueError, match=r"expected a contiguous torch.float32 tensor \[2, 40\]"):
        encode_block(torch.zeros(2, 48), weights, *arguments)
    with pytest.raises(ValueError, match=r"expected a contiguous torch.float32 tensor \[3, 9\]"):
        encode_block(torch.zeros(2, 40), weights, *arguments[:5], torch.zeros(2, 9), 1.0)


# Sums of a register, registers, and products of each sum in one instruction.
IN_REGISTERS: dict[str, tuple[int, int, dict[torch.dtype, int]]] = {
    "avx512": (16, 24, {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}),
    "avx2-vnni": (8, 12, {torch.float32: 1, torch.bfloat16: 1, torch.float16: 1, torch.int8: 4}),
    "avx2": (8, 12, {torch.float32: 1, torch.bfloat16: 1, torch.float16: 1, torch.int8: 2}),
}


@every_set
def test_operations_of_registers_are_counted(instructions: InstructionSet) -> None:
    """Of each thread; a product and its addition are two."""
    threads = torch.get_num_threads()
    sums, registers, products = IN_REGISTERS[instructions.name]
    for dtype, numbers in products.items():
        assert multiply_in_registers(dtype, 100, instructions) == threads * 100 * registers * sums * 2 * numbers
    with pytest.raises(ValueError, match=r"the kernels for AVX.* multiply torch\..*, and not torch.float64"):
        multiply_in_registers(torch.float64, 100, instructions)


@needs_kernels
def test_wrong_tensors_are_refused() -> None:
    weight = KernelWeight.plain(torch.zeros(4, 8), torch.bfloat16)
    with pytest.raises(ValueError, match=r"contiguous torch.float32 tensor \[2, 8\] on the CPU; got torch.bfloat16"):
        normed_product(torch.zeros(2, 8, dtype=torch.bfloat16), None, 1e-6, weight)
    with pytest.raises(ValueError, match=r"tensor \[2, 4\] on the CPU; got torch.float32 \[2, 5\]"):
        add_product(torch.zeros(2, 8, dtype=torch.bfloat16), weight, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"even sizes, not 0, in bfloat16.* or float8.* got torch.float64 \[4, 7\]"):
        KernelWeight.plain(torch.zeros(4, 7, dtype=torch.float64), torch.float32)
    with pytest.raises(ValueError, match=r"scales and a depth that is a multiple of 4; got torch.int8 \[4, 6\]"):
        KernelWeight.plain(torch.zeros(4, 6, dtype=torch.int8), torch.float32, scales=torch.ones(4))
    with pytest.raises(ValueError, match=r"must be in panels"):
        in_8_bits = KernelWeight.plain(torch.zeros(4, 8, dtype=torch.int8), torch.float32, scales=torch.ones(4))
        normed_product(torch.zeros(2, 8), None, 1e-6, in_8_bits)


@every_set
def test_activations_in_another_dtype_are_refused(instructions: InstructionSet) -> None:
    with pytest.raises(ValueError, match=r"for AVX.* compute in (bfloat16 or )?float32, and not in torch.float16"):
        KernelWeight.plain(torch.zeros(4, 8), torch.float16, instructions=instructions)


@every_set
def test_torchs_number_of_threads_holds(instructions: InstructionSet) -> None:
    code = (
        "import torch; torch.set_num_threads(3); from nai_t5_core.backends.kernels.build import library; "
        "from nai_t5_core.backends.kernels.sets import named; "
        f"print(library(named('{instructions.name}')).t5_threads())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["3"]


# ---------------------------------------------------------------------------------------------------------------------
# Encoders
# ---------------------------------------------------------------------------------------------------------------------

LENGTHS = (12, 5, 1)
IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(3))
MASK = padding_mask(list(LENGTHS), 12)
HOLES = torch.tensor([[1] * 12, [1, 0, 1, 1] + [0] * 8, [0] * 12])


def exact_and_rounded(
    config: T5Config, layout: Layout = "fused", dtype: torch.dtype = torch.bfloat16
) -> tuple[T5EncoderStack, T5EncoderStack]:
    """Encoders in float64 and in ``dtype``, the first with the second's weights."""
    state = {name: tensor.to(dtype).float() for name, tensor in random_state(config).items()}
    exact = build_stack(config, state, torch.float64, layout)
    return exact.requires_grad_(False), build_stack(config, state, dtype, layout).requires_grad_(False)


def by_set(stack: T5EncoderStack, instructions: InstructionSet) -> T5EncoderStack:
    """In place, by the kernels for this set."""
    block: Any
    for block in stack.encoder.block:
        block.runner = None
    return run_in_place(stack, instructions.name)  # type: ignore[arg-type]


def by_torch(stack: T5EncoderStack, *inputs: Tensor, **options: PaddingPolicy) -> Tensor:
    """What torch computes, for which gradients need only be on."""
    with torch.enable_grad():
        return stack(*inputs, **options)


@pytest.mark.parametrize("padding", PADDING_POLICIES)
@pytest.mark.parametrize("mask", [MASK, HOLES], ids=["runs", "holes"])
@encoding
@torch.no_grad()
def test_encoders_are_as_exact_as_torchs(
    kind: str, mask: Tensor, padding: PaddingPolicy, instructions: InstructionSet, dtype: torch.dtype
) -> None:
    exact, rounded = exact_and_rounded(TOY_CONFIGS[kind], dtype=dtype)
    by_set(rounded, instructions)
    assert rounded.describe_attention() == "auto: kernels"
    expected = exact(IDS, mask, padding=padding).float()
    found, theirs = rounded(IDS, mask, padding=padding), by_torch(rounded, IDS, mask, padding=padding)
    mean = [float((x.float() - expected).abs().mean()) for x in (found, theirs)]
    assert mean[0] <= (1.5 if dtype == torch.float32 else 1.1) * mean[1]
    assert error(found, expected) < {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 3e-6}[dtype]
    if instructions.stored[dtype] != dtype:
        # All that is rounded is the result.
        assert mean[0] < 0.9 * mean[1]
    assert not torch.equal(found, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@encoding
@torch.no_grad()
def test_packed_encoders_give_what_plain_ones_give(
    kind: str, layout: Layout, instructions: InstructionSet, dtype: torch.dtype
) -> None:
    _, plain = exact_and_rounded(TOY_CONFIGS[kind], layout, dtype)
    by_set(plain, instructions)
    packed = prepack(copy.deepcopy(plain), instructions.name)  # type: ignore[arg-type]
    assert all(isinstance(block.runner, KernelsOnPanels) for block in packed.encoder.block)
    found = [packed(IDS, MASK) for _ in range(3)]
    assert torch.equal(found[1], found[2])
    if layout == "fused":
        assert torch.equal(found[0], plain(IDS, MASK)) and torch.equal(found[0], found[1])
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.modules())
    original = plain.encoder.block[1].state_dict()
    given_back = packed.encoder.block[1].state_dict()
    assert given_back.keys() == original.keys()
    assert all(torch.equal(given_back[name], original[name]) for name in original)


@needs_kernels
@torch.no_grad()
def test_originals_are_kept_for_one_call_and_then_let_go() -> None:
    _, stack = exact_and_rounded(TOY_CONFIGS["v1.1"])
    originals = [weakref.ref(module.weight) for module in stack.modules() if isinstance(module, torch.nn.Linear)]
    prepack(stack, "kernels")
    held = [block.layer[1].DenseReluDense.wo.forms[0].held for block in stack.encoder.block]
    assert {name for name, _ in stack.named_parameters()} == {
        "shared.weight",
        "encoder.final_layer_norm.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    }
    assert not any(original() for original in originals)
    kept = [weakref.ref(one.kernels.weights[-1].pieces[0].values) for one in held]
    stack(IDS)
    assert not any(one.kernels.is_in_panels for one in held) and all(weight() is not None for weight in kept)
    stack(IDS)
    assert all(one.kernels.is_in_panels for one in held) and not any(weight() is not None for weight in kept)


@every_set
@pytest.mark.parametrize("in_8_bits", [False, True])
@torch.no_grad()
def test_prompts_come_out_the_same_whatever_is_beside_them(in_8_bits: bool, instructions: InstructionSet) -> None:
    """However many rows there are, by which products may be computed in another way."""
    _, plain = exact_and_rounded(TOY_CONFIGS["v1.1"])
    change: Any = quantize_int8 if in_8_bits else prepack
    stacks = [change(copy.deepcopy(plain), instructions.name)]
    if not in_8_bits:
        stacks.append(by_set(plain, instructions))
    lengths = [*LENGTHS, 40, 100, 2]
    ids = torch.randint(3, 96, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(3))
    for stack in stacks:
        together = stack(ids, padding_mask(lengths, max(lengths)), padding="skip")
        for row, length in enumerate(lengths):
            assert torch.equal(together[row, :length], stack(ids[row : row + 1, :length])[0])


@needs_kernels
def test_torch_computes_where_it_is_needed() -> None:
    _, stack = exact_and_rounded(TOY_CONFIGS["v1.1"])
    block, best = stack.encoder.block[0], build.nearest_set()
    with counted() as by_kernels:
        stack(IDS)  # records gradients
    assert by_kernels.flops == 0
    with torch.no_grad():
        with counted() as by_kernels:
            stack(IDS)
        assert by_kernels.flops > 0
        with FlopCounterMode(display=False) as counter:
            stack(IDS)
        assert counter.get_total_flops() > 0
        handle = block.layer[0].SelfAttention.o.register_forward_hook(lambda *_: None)
        assert refuses_in_place(block, torch.bfloat16, best) == "other software hooks into its modules"
        handle.remove()
        assert refuses_in_place(block, torch.bfloat16, best) is None
        block.layer[0].out_scale = 0.5
        assert "float16 scales" in str(refuses_in_place(block, torch.bfloat16, best))
        assert stack.describe_attention() == "auto: kernels, and sdpa in 1 blocks"


@needs_kernels
@torch.no_grad()
def test_drop_ins_run_by_them_until_a_projection_is_cast() -> None:
    config = TOY_CONFIGS["v1.1"].encoder_only()
    stack = run_in_place(T5EncoderStack(config, ops=CastingOps, dtype=torch.bfloat16))
    block: Any = stack.encoder.block[0]
    assert block.attends_by_itself(torch.bfloat16)
    block.layer[1].DenseReluDense.wo.to(torch.float32)
    assert not block.attends_by_itself(torch.bfloat16)


@needs_kernels
@torch.no_grad()
def test_weights_changed_in_place_are_seen() -> None:
    _, stack = exact_and_rounded(TOY_CONFIGS["v1.1"])
    before = stack(IDS)
    stack.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(2)
    after = stack(IDS)
    assert not torch.equal(before, after)
    assert error(after, by_torch(stack, IDS).float()) < 3e-2


@needs_kernels
@torch.no_grad()
def test_threads_may_call_at_the_same_time() -> None:
    _, stack = exact_and_rounded(TOY_CONFIGS["v1.1"])
    expected = stack(IDS, MASK)
    wrong: list[int] = []

    def call(number: int) -> None:
        with torch.no_grad():
            if not all(torch.equal(stack(IDS, MASK), expected) for _ in range(20)):
                wrong.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_products_are_a_choice() -> None:
    config = TOY_CONFIGS["v1.1"]
    with pytest.raises(
        ValueError, match="unknown products 'mkl'; allowed: auto, kernels, amx, avx512, avx2-vnni, avx2, onednn"
    ):
        prepack(build_stack(config, random_state(config)), "mkl")  # type: ignore[arg-type]
    scaled = build_stack(config, random_state(config))
    scaled.encoder.block[0].layer[0].out_scale = 0.5
    with pytest.raises(ValueError, match=r"products='kernels' is not possible: a block has float16 scales"):
        prepack(scaled, "kernels")


@needs_kernels
def test_onednn_computes_what_the_kernels_cannot() -> None:
    config = TOY_CONFIGS["v1.1"].model_copy(update={"activation": "gelu"})
    _, stack = exact_and_rounded(config)
    with pytest.raises(ValueError, match="the activation is gelu, which the kernels do not know"):
        prepack(copy.deepcopy(stack), "kernels")
    for packed in (prepack(stack), prepack(exact_and_rounded(TOY_CONFIGS["v1.1"])[1], "onednn")):
        assert all(isinstance(block.runner, OneDNNRunner) for block in packed.encoder.block)


@every_set
def test_a_copy_has_its_own_panels(instructions: InstructionSet) -> None:
    """What the kernels are told of panels is kept with them, and must not go along to a copy."""
    weight = KernelWeight.plain(torch.randn(32, 64), torch.float32, instructions=instructions).in_panels()
    before = weight.matrix()
    assert weight.panels is not None
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert other.panels is not None
        assert other.matrix().panels == other.panels.data_ptr() != before.panels == weight.panels.data_ptr()
        assert torch.equal(other.original(), weight.original())
    assert weight.matrix() is before
