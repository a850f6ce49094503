"""Quantised weights that the kernels read as they lie: numbers to the bit, products, whole encoders, and reports."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import encoder_part, spiece_model
from conftest import TOY_CONFIGS, every_set, needs_kernels, padding_mask, random_state, set_param
from test_quantised_files import file_of
from torch import Tensor
from toy_gguf import write_gguf

from nai_t5_core import TextEncoder, load_encoder
from nai_t5_core.backends.choose import run_quantised
from nai_t5_core.backends.kernels.build import best_set, missing_for
from nai_t5_core.backends.kernels.calls import add_product, counted, normed_product
from nai_t5_core.backends.kernels.pieces import BLOCK_FORMATS, WeightPiece
from nai_t5_core.backends.kernels.sets import SETS, InstructionSet
from nai_t5_core.backends.kernels.weights import KernelWeight
from nai_t5_core.backends.quantised.forms import QuantisedForm
from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.backends.quantised.kernels import runner_of_quantised
from nai_t5_core.backends.quantised.kinds import WEIGHT, Plain, QuantisedWeight
from nai_t5_core.backends.quantised.pieces import is_read, piece_of
from nai_t5_core.backends.quantised.projections import QuantisedLinear
from nai_t5_core.backends.quantised.scaled import MXFP8, NVFP4, SCALE, Scaled, tiled_shape
from nai_t5_core.prompts.cache.settings import settings_of

ROWS, DEPTH = 37, 512
# What a model is in.
every_dtype = pytest.mark.parametrize(
    ("instructions", "dtype"),
    [set_param(instructions, dtype, name=f"-{dtype}") for instructions in SETS for dtype in instructions.stored],
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blocks(name: str, rows: int = ROWS, depth: int = DEPTH) -> QuantisedWeight:
    """Any bytes, with scales that are numbers of either sign, zero and the smallest one among them."""
    kind = GGML_KINDS[name]
    content = torch.randint(0, 256, (rows * depth // kind.block, kind.size), dtype=torch.uint8, generator=generator())
    for seed, start in enumerate(kind.halves):
        scales = (torch.randn(len(content), generator=generator(seed)) * 0.1).half()
        scales[:3] = torch.tensor([0.0, -0.0, 6e-8]).half()
        content[:, start : start + 2] = scales[:, None].view(torch.uint8)
    return QuantisedWeight(kind, (rows, depth), {WEIGHT: content.reshape(rows, -1)})


def scaled(dtype: torch.dtype, scale: Tensor | None, unit: float = 1.0) -> QuantisedWeight:
    """Every byte there is, but those that are no numbers."""
    values = torch.arange(ROWS * DEPTH).to(torch.uint8).view(dtype).reshape(ROWS, DEPTH)
    if dtype.is_floating_point:
        values = values.float().nan_to_num(0.5, 2, -2).to(dtype)
    parts = {WEIGHT: values} if scale is None else {WEIGHT: values, SCALE: scale}
    return QuantisedWeight(Scaled("any", dtype, unit=unit), (ROWS, DEPTH), parts)


def of_rows() -> Tensor:
    return torch.rand(ROWS, 1, generator=generator(3)) + 0.1


def weights() -> dict[str, QuantisedWeight]:
    found = {name: blocks(name) for name in GGML_KINDS}
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
        found[f"{dtype}, by rows"] = scaled(dtype, of_rows())
        found[f"{dtype}, by weight"] = scaled(dtype, torch.tensor(0.37, dtype=torch.float64))
    found["float8, without a scale"] = scaled(torch.float8_e4m3fn, None)
    found["int8 of bitsandbytes"] = scaled(torch.int8, of_rows()[:, 0], 1 / 127)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        numbers = torch.randn(ROWS, DEPTH, generator=generator(4)).to(dtype)
        found[str(dtype)] = QuantisedWeight(Plain(dtype), (ROWS, DEPTH), {WEIGHT: numbers})
    return found


WEIGHTS = weights()
NORM = torch.randn(DEPTH, generator=generator(5))
FACTORS = {"": (None, 1.0), "norm": (NORM, 1.0), "norm and scale": (NORM, 0.5), "scale": (None, 0.25)}


def forms(factors: str) -> dict[str, QuantisedForm]:
    columns, scale = FACTORS[factors]
    return {name: QuantisedForm(weight, columns, scale) for name, weight in WEIGHTS.items()}


def read_by_kernels(
    pieces: list[WeightPiece], dtype: torch.dtype, instructions: InstructionSet, is_gated: bool = False
) -> KernelWeight:
    return KernelWeight.of_pieces(pieces, dtype, instructions.stored[dtype], is_gated, instructions)


def assert_same_bits(found: Tensor, meant: Tensor) -> None:
    assert found.dtype == meant.dtype and found.shape == meant.shape
    as_bits = {2: torch.int16, 4: torch.int32}[found.dtype.itemsize]
    assert torch.equal(found.view(as_bits), meant.view(as_bits))


def test_all_kinds_of_ggml_are_read() -> None:
    assert {name: (known.numbers, known.bytes) for name, known in BLOCK_FORMATS.items()} == {
        name: (kind.block, kind.size) for name, kind in GGML_KINDS.items()
    }
    assert len({known.format for known in BLOCK_FORMATS.values()}) == len(BLOCK_FORMATS)
    assert all(is_read(weight.kind) for weight in WEIGHTS.values())
    in_blocks = Scaled("float8 in blocks", torch.float8_e4m3fn, (128, 128))
    others = (MXFP8(), NVFP4(), in_blocks, Scaled("turned", torch.int8, turned=16), Plain(torch.float64))
    assert not any(map(is_read, others))


@every_dtype
@pytest.mark.parametrize("factors", FACTORS)
def test_numbers_are_those_of_the_kind(factors: str, instructions: InstructionSet, dtype: torch.dtype) -> None:
    """To the bit, rounded once."""
    for form in forms(factors).values():
        weight = read_by_kernels([piece_of(form)], dtype, instructions).in_panels()
        assert_same_bits(weight.original(), form.plain(dtype))


@every_dtype
@pytest.mark.parametrize("is_gated", [False, True])
def test_pieces_of_all_kinds_make_a_weight(is_gated: bool, instructions: InstructionSet, dtype: torch.dtype) -> None:
    """Of 37 columns each, so that a register has columns of two."""
    # Some numbers of float8 exceed float16.
    some = [form for form in forms("norm").values() if bool(form.plain(dtype).isfinite().all())] * 2
    weight = read_by_kernels([piece_of(form) for form in some], dtype, instructions, is_gated)
    meant = torch.cat([form.plain(dtype) for form in some])
    assert_same_bits(weight.in_panels().original(), meant)
    x = torch.randn(13, DEPTH, generator=generator(6))
    stored = instructions.stored[dtype]
    assert torch.equal(
        normed_product(x, None, 1e-6, weight, "silu"), normed_product(x, None, 1e-6, weight.in_panels(), "silu")
    )
    if not is_gated:
        for ours in (weight, weight.in_panels()):
            add_product(x.to(stored), ours, total := torch.zeros(13, len(meant)))
            exact = x.to(stored).double() @ meant.double().T
            assert float((total - exact).abs().max() / exact.abs().max()) < 1e-5


@every_set
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_bytes_may_begin_anywhere(shift: int, instructions: InstructionSet) -> None:
    for form in forms("norm").values():
        values = form.weight.parts[WEIGHT]
        moved = torch.cat((torch.zeros(shift, dtype=torch.uint8), values.reshape(-1).view(torch.uint8)))[shift:]
        aside = torch.frombuffer(moved.numpy(), dtype=torch.uint8).view(torch.uint8)
        piece = piece_of(form)
        if values.dtype.itemsize > 1:
            continue  # torch itself makes no such view; plain numbers have tests of their own
        there = WeightPiece(
            aside.view(values.dtype).reshape(values.shape),
            ROWS,
            DEPTH,
            piece.blocks,
            piece.scales,
            piece.factors,
            piece.unit,
        )
        assert there.values.data_ptr() % 4 == (values.data_ptr() + shift) % 4
        dtype = torch.float32
        assert_same_bits(read_by_kernels([there], dtype, instructions).in_panels().original(), form.plain(dtype))


@needs_kernels
def test_pieces_that_do_not_fit_are_refused() -> None:
    floats = torch.zeros(4, 64)
    content = torch.zeros(4, 68, dtype=torch.uint8)
    wrong: list[tuple[list[WeightPiece], str]] = [
        ([WeightPiece(content, 4, 32, "Q8_0")], "expected a contiguous"),
        ([WeightPiece(content, 4, 48, "Q8_0")], "a depth of 48 is no whole blocks"),
        ([WeightPiece(content.T.contiguous().T, 4, 64, "Q8_0")], "not contiguous"),
        ([WeightPiece(content, 5, 64, "Q8_0")], "expected a contiguous"),
        ([WeightPiece(floats, 4, 64, scales=torch.ones(4))], "scales of columns are for numbers of a byte"),
        ([WeightPiece(content, 4, 64, "Q8_0", scales=torch.ones(4))], "scales of columns are for numbers of a byte"),
        ([WeightPiece(floats.to(torch.int8), 4, 64, scales=torch.ones(3))], "expected a contiguous"),
        ([WeightPiece(floats, 4, 64, factors=torch.ones(63))], "expected a contiguous"),
        ([WeightPiece(floats.double(), 4, 64)], r"do not read weights in torch\.float64"),
        ([WeightPiece(floats, 4, 64), WeightPiece(torch.zeros(4, 32), 4, 32)], "pieces of one even depth"),
        ([], "pieces of one even depth"),
    ]
    for pieces, told in wrong:
        with pytest.raises(ValueError, match=told):
            KernelWeight.of_pieces(pieces, torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"do not multiply torch\.int8"):
        KernelWeight.of_pieces([WeightPiece(floats, 4, 64)], torch.int8, torch.float32)
    whole = KernelWeight.of_pieces([WeightPiece(floats, 4, 64)], torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"are not, or no longer, \[4, 64\]"):
        replace(whole, pieces=(WeightPiece(floats[:2], 2, 64),)).matrix()


# ---------------------------------------------------------------------------------------------------------------------
# Whole encoders
# ---------------------------------------------------------------------------------------------------------------------

IDS = torch.randint(3, 90, (3, 12), generator=generator(7))
MASK = padding_mask([12, 5, 1], 12)


@every_dtype
@pytest.mark.parametrize("layout", ["fused", "separate"])
def test_an_encoder_is_computed_from_the_file(
    layout: Any, instructions: InstructionSet, dtype: torch.dtype, tmp_path: Path
) -> None:
    """As of unpacked weights, within the rounding of the dtype."""
    products: Any = instructions.name
    for name in ("Q8_0", "Q4_0"):
        file = file_of(name, tmp_path)
        stack = run_quantised(load_encoder(file, dtype, "cpu", layout), products)
        meant = load_encoder(file, "float64", "cpu", layout, unpack=True)
        with torch.no_grad(), counted() as ours:
            found = stack(IDS, MASK)
            expected = meant(IDS, MASK)
        assert ours.flops > 0
        told = f"{instructions.title} kernels, quantised weights"
        told += ", in float32" if instructions.stored[dtype] != dtype else ""
        assert {block.extra_repr() for block in stack.encoder.block} == {told}
        rows = MASK.bool()
        difference = (found.double() - expected)[rows].abs().max() / expected[rows].abs().max()
        assert float(difference) < {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]


@needs_kernels
def test_nothing_is_kept_beside_the_bytes(tmp_path: Path) -> None:
    """However often it is called, the kernels are told of the file's own bytes, and nothing is in panels."""
    stack = load_encoder(file_of("Q8_0", tmp_path), "float32", "cpu")
    with torch.no_grad():
        for _ in range(4):
            stack(IDS, MASK)
    for block in stack.encoder.block:
        held = [form for part in block.modules() if isinstance(part, QuantisedLinear) for form in part.forms]
        kernels = block.runner._looked.kernels
        assert not any(weight.is_in_panels for weight in kernels.weights)
        read = {piece.values.data_ptr() for weight in kernels.weights for piece in weight.pieces}
        assert read == {form.weight.parts[WEIGHT].data_ptr() for form in held} and len(read) == len(held)


@needs_kernels
def test_a_file_of_several_kinds_is_computed_block_by_block(tmp_path: Path) -> None:
    """A kind that the kernels do not read leaves its block to torch, and is named."""
    stack = load_encoder(file_of("Q8_0", tmp_path), "float32", "cpu")
    o = stack.encoder.block[1].layer[0].SelfAttention.o
    o.forms = tuple(replace(form, weight=as_mxfp8(form.weight)) for form in o.forms)
    stack.encoder.block[1].runner = runner_of_quantised(stack.encoder.block[1])
    names = [block.runner.name for block in stack.encoder.block]
    assert names[1] == "quantised weights (the kernels do not read MXFP8)"
    assert {*names} - {names[1]} == {f"{best_title()} kernels, quantised weights"}
    with torch.no_grad(), counted() as ours:
        found = stack(IDS, MASK)
    assert ours.flops > 0
    for block in stack.encoder.block:
        block.runner = None
    with torch.no_grad():
        torch.testing.assert_close(found, stack(IDS, MASK), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"products='kernels' is not possible: the kernels do not read MXFP8"):
        run_quantised(stack, "kernels")


def as_mxfp8(weight: QuantisedWeight) -> QuantisedWeight:
    powers = torch.full(tiled_shape(weight.shape[0], weight.shape[1] // 32), 127, dtype=torch.uint8)
    return QuantisedWeight(MXFP8(), weight.shape, {WEIGHT: weight.plain().to(torch.float8_e4m3fn), SCALE: powers})


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def best_title() -> str:
    found = best_set()
    assert found is not None
    return found.title


@needs_kernels
def test_what_changes_is_seen(tmp_path: Path) -> None:
    """Other forms, scales and dtypes: what was told to the kernels is told anew."""
    stack = load_encoder(file_of("Q8_0", tmp_path), "float32", "cpu")
    first = stack.encoder.block[0]
    with torch.no_grad():
        before = stack(IDS, MASK)
        wo = first.layer[1].DenseReluDense.wo
        wo.multiply_rows(0.5, 0)
        halved = stack(IDS, MASK)
        assert not torch.equal(halved, before)
        wo.multiply_rows(2.0, 0)
        assert torch.equal(stack(IDS, MASK), before)
        assert stack.double()(IDS, MASK).dtype == torch.float64
        assert first.extra_repr() == "quantised weights"
        assert torch.equal(stack.float()(IDS, MASK), before)
        twin = copy.deepcopy(stack)
        del stack, first, wo
        assert torch.equal(twin(IDS, MASK), before)


@needs_kernels
def test_products_name_a_set(tmp_path: Path) -> None:
    config = TOY_CONFIGS["v1.1"].encoder_only().model_copy(update={"vocab_size": 4096})
    file = write_gguf(tmp_path / "t5.gguf", encoder_part(random_state(config)), "Q8_0", tokenizer=spiece_model())
    for each in SETS:
        if missing_for(each) is None:
            products: Any = each.name
            encoder = TextEncoder.from_pretrained(file, "float32", "cpu", products=products)
            encoder.encode(["a cat"])
            told = {block.runner.name for block in encoder.stack.encoder.block}
            assert told == {f"{each.title} kernels, quantised weights"}
    with pytest.raises(ValueError, match="products='onednn' is not possible"):
        TextEncoder.from_pretrained(file, "float32", "cpu", products="onednn")


@needs_kernels
def test_what_computes_is_in_the_key(tmp_path: Path) -> None:
    """Of kinds that the kernels read, and of no others."""
    keys = {}
    for name in ("Q8_0", "NVFP4"):
        file = file_of(name, made(tmp_path / name))
        ways: list[Any] = ["auto", *(each.name for each in SETS if missing_for(each) is None)]
        keys[name] = {way: settings_of(file, "float32", "cpu", products=way).key([5, 1]).text for way in ways}
    assert len(set(keys["NVFP4"].values())) == 1
    assert len(set(keys["Q8_0"].values())) == len(keys["Q8_0"]) - 1, "auto is the best of them"
    file = tmp_path / "Q8_0" / "t5.gguf"
    assert "kernels" not in settings_of(file, "float64", "cpu").backend
    assert settings_of(file, "float32", "cpu").backend == f"cpu, quantised weights, auto, {best_title()} kernels " + (
        "for all that they read"
    )
