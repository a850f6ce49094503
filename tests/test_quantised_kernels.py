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
from toy_kinds import DEPTH, beside, four_bits, generator, in_blocks, mxfp8, turned, weights

from nai_t5_core import TextEncoder, load_encoder
from nai_t5_core.backends.choose import run_quantised
from nai_t5_core.backends.kernels.beside import BESIDE_FORMATS, NestedScales, ScalesBeside
from nai_t5_core.backends.kernels.build import best_set, missing_for
from nai_t5_core.backends.kernels.calls import add_product, counted, normed_product
from nai_t5_core.backends.kernels.pieces import BLOCK_FORMATS, TURNED, WeightPiece
from nai_t5_core.backends.kernels.sets import SETS, InstructionSet
from nai_t5_core.backends.kernels.weights import KernelWeight
from nai_t5_core.backends.quantised.forms import QuantisedForm
from nai_t5_core.backends.quantised.four_bits import LARGEST, FourBits
from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.backends.quantised.kernels import runner_of_quantised
from nai_t5_core.backends.quantised.kinds import WEIGHT, Plain, QuantisedWeight
from nai_t5_core.backends.quantised.pieces import is_read, piece_of
from nai_t5_core.backends.quantised.projections import QuantisedLinear
from nai_t5_core.backends.quantised.scaled import FLOATS, SCALE, Scaled, rotation
from nai_t5_core.prompts.cache.settings import settings_of

# What a model is in.
every_dtype = pytest.mark.parametrize(
    ("instructions", "dtype"),
    [set_param(instructions, dtype, name=f"-{dtype}") for instructions in SETS for dtype in instructions.stored],
)


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
    formats = [known.format for known in (*BLOCK_FORMATS.values(), *BESIDE_FORMATS.values())]
    assert len(set(formats)) == len(formats)
    assert all(is_read(weight.kind) for weight in WEIGHTS.values())


def test_other_kinds_are_not_read() -> None:
    others = (
        Scaled("a rotation of many", torch.int8, turned=1024),
        Scaled("a rotation with a unit", torch.int8, turned=16, unit=0.5),
        Scaled("a rotation of float8", torch.float8_e4m3fn, turned=16),
        Scaled("float8 of another kind", torch.float8_e4m3fnuz),
        Scaled("int8 in blocks", torch.int8, (1, 32)),
        Scaled("float8 of another kind, in blocks", torch.float8_e4m3fnuz, (128, 128)),
        Scaled("blocks of 8", torch.float8_e4m3fn, (8, 8)),
        Scaled("blocks of 48", torch.float8_e4m3fn, (48, 128)),
        Scaled("blocks with a unit", torch.float8_e4m3fn, (128, 128), unit=0.5),
        FourBits("blocks of 8", 8),
        FourBits("blocks of 48", 48),
        FourBits("48 blocks", 64, 48),
        Plain(torch.float64),
    )
    assert not any(map(is_read, others))


@every_dtype
@pytest.mark.parametrize("factors", FACTORS)
def test_numbers_are_those_of_the_kind(factors: str, instructions: InstructionSet, dtype: torch.dtype) -> None:
    """To the bit, rounded once."""
    for form in forms(factors).values():
        weight = read_by_kernels([piece_of(form)], dtype, instructions).in_panels()
        assert_same_bits(weight.original(), form.plain(dtype))


@every_set
@pytest.mark.parametrize(("rows", "depth"), [(1, 64), (129, 320), (300, 64), (40, 1088)])
def test_scales_beside_the_numbers_at_every_edge(rows: int, depth: int, instructions: InstructionSet) -> None:
    """Of tiles and blocks that are not full, and of depths that are no whole 256."""
    found = beside(rows, depth)
    for block in (16, 32, 64):
        found[f"4 bits by {block}"] = four_bits(rows, depth, block)
        found[f"4 bits by {block}, nested"] = four_bits(rows, depth, block, 4)
    found["the smallest powers"] = mxfp8(rows, depth, least=1)
    found["a row that ends within 16"] = in_blocks(rows, depth + 6, torch.float8_e4m3fn)
    found["blocks of 32 by 16"] = in_blocks(rows, depth + 6, torch.float8_e5m2, (32, 16))
    for name, weight in found.items():
        form = QuantisedForm(weight, torch.randn(weight.shape[1], generator=generator(12)))
        ours = read_by_kernels([piece_of(form)], torch.float32, instructions).in_panels()
        assert torch.equal(ours.original(), form.plain(torch.float32)), name


@every_dtype
@pytest.mark.parametrize("group", TURNED)
def test_rotations_at_every_edge(group: int, instructions: InstructionSet, dtype: torch.dtype) -> None:
    """Of depths that are no whole 256, of registers that are not full, and of those that others share."""
    for rows, depth in ((1, group), (21, 256 + group), (37, 3 * group), (64, 5 * 256)):
        columns = torch.randn(depth, generator=generator(12))
        some = [QuantisedForm(turned(group, rows, depth), columns), QuantisedForm(turned(4, 3, depth), None, -0.5)]
        some += [QuantisedForm(each, columns) for each in (in_blocks(7, depth, torch.float8_e4m3fn), some[0].weight)]
        exact = turned_exactly(some[0].weight) * columns.double()
        torch.testing.assert_close(some[0].plain(torch.float32).double(), exact, rtol=2**-23, atol=0)
        for is_gated in (False, True):
            weight = read_by_kernels([piece_of(form) for form in some + some], dtype, instructions, is_gated)
            meant = torch.cat([form.plain(dtype) for form in some + some])
            assert_same_bits(weight.in_panels().original(), meant)
            x = torch.randn(120, depth, generator=generator(6))
            out = normed_product(x, None, 1e-6, weight, "silu")
            assert torch.equal(out, normed_product(x, None, 1e-6, weight.in_panels(), "silu"))
            assert torch.equal(out[40:45], normed_product(x[40:45], None, 1e-6, weight, "silu"))


def turned_exactly(weight: QuantisedWeight) -> Tensor:
    """Turned back in float64."""
    kind = weight.kind
    assert isinstance(kind, Scaled)
    signs = rotation(kind.turned, torch.device("cpu")).double()
    scaled = weight.parts[WEIGHT].double() * weight.parts[SCALE].double()
    return (scaled.view(len(scaled), -1, kind.turned) @ signs.T).view_as(scaled)


@needs_kernels
@pytest.mark.parametrize("block", [64, 128, 256, 512, 1024, 4096])
@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize("dtype", FLOATS)
def test_four_bits_in_blocks_of_every_size(block: int, nested: int, dtype: torch.dtype) -> None:
    """And with scales and tables in every dtype; float32 scales are not copied."""
    form = QuantisedForm(four_bits(3, 8192, block, nested, dtype))
    piece = piece_of(form)
    assert piece.beside is not None
    is_copied = piece.beside.scales.data_ptr() != form.weight.parts[LARGEST].data_ptr()
    assert is_copied == (not nested and dtype != torch.float32)
    ours = KernelWeight.of_pieces([piece], torch.float32, torch.float32).in_panels()
    assert_same_bits(ours.original(), form.plain(torch.float32))


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


def shifted(tensor: Tensor, shift: int) -> Tensor:
    """The same numbers, so many bytes behind a multiple of 16."""
    content = bytes(16 + shift) + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    memory = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    first = -memory.data_ptr() % 16 + shift
    memory[first : first + tensor.nbytes] = memory[16 + shift :].clone()
    found = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=first)
    assert found.data_ptr() % 16 == shift
    return found.reshape(tensor.shape)


@every_set
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_bytes_may_begin_anywhere(shift: int, instructions: InstructionSet) -> None:
    for form in forms("norm").values():
        values = form.weight.parts[WEIGHT]
        piece = piece_of(form)
        if values.dtype.itemsize > 1:
            continue  # plain numbers have tests of their own
        there = replace(piece, values=shifted(values, shift))
        if piece.beside is not None:
            there = replace(there, beside=replace(piece.beside, scales=shifted(piece.beside.scales, shift)))
        dtype = torch.float32
        assert_same_bits(read_by_kernels([there], dtype, instructions).in_panels().original(), form.plain(dtype))


def in_int8() -> WeightPiece:
    return WeightPiece(torch.zeros(4, 64, dtype=torch.int8), 4, 64, scales=torch.ones(4))


def in_4_bits(**changes: Any) -> WeightPiece:
    scales = replace(ScalesBeside("4 bits", torch.ones(4, 1), 64, table=torch.ones(16)), **changes)
    return WeightPiece(torch.zeros(4, 32, dtype=torch.uint8), 4, 64, beside=scales)


def in_4_bits_nested(**changes: Any) -> WeightPiece:
    nested = replace(NestedScales(torch.ones(256), torch.ones(2), 2, 0.0), **changes)
    return in_4_bits(format="4 bits, nested", scales=torch.zeros(4, 1, dtype=torch.uint8), nested=nested)


@needs_kernels
def test_pieces_that_do_not_fit_are_refused() -> None:
    replace(in_int8(), turned=64).described(), in_4_bits().described(), in_4_bits_nested().described()
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
        ([replace(in_int8(), turned=16, unit=0.5)], "only numbers in int8 without a unit can have been rotated"),
        ([WeightPiece(floats, 4, 64, turned=16)], "only numbers in int8 without a unit can have been rotated"),
        ([replace(in_int8(), turned=8)], "4, 16, 64, 256 numbers that the depth divides by; got 8, with a depth"),
        ([replace(in_int8(), turned=256)], "that the depth divides by; got 256, with a depth of 64"),
        ([replace(in_int8(), turned=1024)], "that the depth divides by; got 1024, with a depth of 64"),
        ([WeightPiece(floats, 4, 64, factors=torch.ones(63))], "expected a contiguous"),
        ([in_4_bits(scales=torch.ones(4, 2))], r"expected a contiguous .*\[4, 1\]"),
        ([in_4_bits(scales=torch.ones(4, 1, dtype=torch.float64))], "expected a contiguous"),
        ([in_4_bits(table=torch.ones(15))], "expected a contiguous"),
        ([in_4_bits(table=None)], "has not the tables that it needs"),
        (
            [in_4_bits(nested=NestedScales(torch.ones(256), torch.ones(1), 256, 0.0))],
            "has not the tables that it needs",
        ),
        ([in_4_bits(across=8)], "16 numbers or more and for powers of two; got 8 of 1 columns"),
        ([in_4_bits(down=3)], "16 numbers or more and for powers of two; got 64 of 3 columns"),
        ([in_4_bits(across=128)], "a depth of 64 does not divide by 128, which a scale of 4 bits is for"),
        ([replace(in_4_bits(), scales=torch.ones(4))], "scales of columns are for numbers of a byte"),
        ([replace(in_4_bits(), values=content)], "expected a contiguous"),
        ([in_4_bits_nested(codes=torch.ones(255))], "expected a contiguous"),
        ([in_4_bits_nested(outer=torch.ones(3))], "expected a contiguous"),
        ([in_4_bits_nested(block=3)], "outer scales are for powers of two; got 3"),
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
@pytest.mark.parametrize(
    "name", ["Q8_0", "Q4_0", "NF4", "NF4, not nested", "FP4", "NVFP4", "MXFP8", "float8, in blocks", "int8, rotated"]
)
def test_an_encoder_is_computed_from_the_file(
    name: str, layout: Any, instructions: InstructionSet, dtype: torch.dtype, tmp_path: Path
) -> None:
    """As of unpacked weights, within the rounding of the dtype."""
    products: Any = instructions.name
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
    o.forms = tuple(replace(form, weight=unread(form.weight)) for form in o.forms)
    stack.encoder.block[1].runner = runner_of_quantised(stack.encoder.block[1])
    names = [block.runner.name for block in stack.encoder.block]
    assert names[1] == "quantised weights (the kernels do not read float8_e4m3fnuz)"
    assert {*names} - {names[1]} == {f"{best_title()} kernels, quantised weights"}
    with torch.no_grad(), counted() as ours:
        found = stack(IDS, MASK)
    assert ours.flops > 0
    for block in stack.encoder.block:
        block.runner = None
    with torch.no_grad():
        torch.testing.assert_close(found, stack(IDS, MASK), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="'kernels' is not possible: the kernels do not read float8_e4m3fnuz"):
        run_quantised(stack, "kernels")


def unread(weight: QuantisedWeight) -> QuantisedWeight:
    """The same numbers nearly, in a kind that the kernels do not read."""
    dtype, numbers = torch.float8_e4m3fnuz, weight.plain()
    scale = numbers.abs().amax(1, keepdim=True) / 240
    parts = {WEIGHT: (numbers / scale).to(dtype), SCALE: scale}
    return QuantisedWeight(Scaled("float8_e4m3fnuz", dtype), weight.shape, parts)


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
    for name in ("Q8_0", "NF4", "int8, rotated", "float8 fnuz, by rows"):
        file = file_of(name, made(tmp_path / name))
        ways: list[Any] = ["auto", *(each.name for each in SETS if missing_for(each) is None)]
        keys[name] = {way: settings_of(file, "float32", "cpu", products=way).key([5, 1]).text for way in ways}
    assert len(set(keys.pop("float8 fnuz, by rows").values())) == 1
    for name in keys:
        assert len(set(keys[name].values())) == len(keys[name]) - 1, "auto is the best of them"
    file = tmp_path / "Q8_0" / "t5.gguf"
    assert "kernels" not in settings_of(file, "float64", "cpu").backend
    assert settings_of(file, "float32", "cpu").backend == f"cpu, quantised weights, auto, {best_title()} kernels " + (
        "for all that they read"
    )
