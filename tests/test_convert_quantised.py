"""Our own quantised files: written once, mapped at load, and as near to the original as their kind allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import spiece_tensor, write_file
from conftest import random_state, write_hf_folder
from test_cli import Run, run  # noqa: F401 - a fixture
from test_quantised_files import CONFIG, IDS, MASK, kinds_in

from nai_t5_core.backends.choose import quantize_int8, why_not_int8
from nai_t5_core.backends.quantised.packing import PACKED_KINDS, PackedKind, pack
from nai_t5_core.backends.quantised.projections import stays_quantised
from nai_t5_core.bench.kinds import kinds_table, measure_kinds
from nai_t5_core.bench.kinds_packing import possible_kinds
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.weights.convert_quantised import convert_quantised
from nai_t5_core.weights.examine import examine
from nai_t5_core.weights.formats import CheckpointError, open_checkpoint
from nai_t5_core.weights.load import load_encoder, load_t5

# Of the largest hidden value, and bits of a weight.
ERRORS = {"int8": 0.04, "q8_0": 0.04, "float8": 0.12, "q4_k": 0.3}
BITS = {"int8": 8.2, "q8_0": 8.5, "float8": 8.01, "q4_k": 4.5}
WHOLE = CONFIG.model_copy(update={"num_decoder_layers": 2})


def original(folder: Path) -> Path:
    return write_hf_folder(folder / "original", WHOLE, random_state(WHOLE))


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_packed_weights(kind: PackedKind) -> None:
    """Near the weight, also where it is zero, constant, tiny or has outliers; a zero is a zero."""
    torch.manual_seed(0)
    weight = torch.randn(16, 512) * 0.05
    weight[:, 9] *= 30
    weight[3], weight[4], weight[5] = 0, 0.25, -1e-6
    packed = pack(weight, kind)
    assert (
        packed.fault() is None
        and packed.kind.fault({name: (tuple(part.shape), part.dtype) for name, part in packed.parts.items()}, (16, 512))
        is None
    )
    found = packed.plain()
    assert bool((found[3] == 0).all())
    step = {"int8": 1 / 254, "q8_0": 1 / 250, "float8": 1 / 28, "q4_k": 1 / 20}[kind]
    assert float((found - weight).abs().max()) <= step * float(weight.abs().max())
    assert packed.nbytes * 8 / weight.numel() < BITS[kind] + 0.1


def test_q8_0_is_that_of_ggml() -> None:
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    with np.errstate(all="ignore"):
        meant = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(pack(weight, "q8_0").parts["weight"], torch.from_numpy(meant))


def test_q4_k_is_nearer_than_four_bits_without_search() -> None:
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    kind = gguf.GGMLQuantizationType.Q4_1
    plain = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
    ours = pack(weight, "q4_k")
    assert float((ours.plain() - weight).square().mean()) < 0.95 * float((plain - weight).square().mean())


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_a_converted_file(tmp_path: Path, kind: PackedKind) -> None:
    source, out = original(tmp_path), tmp_path / "out.safetensors"
    done = convert_quantised(source, out, kind)
    assert done.nbytes == sum(part.nbytes for part in map(open_checkpoint(out).read, open_checkpoint(out).tensors))
    examination = examine(out)
    assert not examination.faults and examination.config == examine(source).config
    assert examination.checkpoint.metadata["source"] == "original"
    stack = load_encoder(out, "float32", "cpu")
    names = {"int8": "int8", "q8_0": "Q8_0", "float8": "float8_e4m3fn", "q4_k": "Q4_K"}
    assert kinds_in(stack) == {names[kind]}
    with torch.no_grad():
        found, meant = (model(IDS, MASK) for model in (stack, load_encoder(source, "float32", "cpu")))
        unpacked = load_encoder(out, "float32", "cpu", unpack=True)(IDS, MASK)
    assert 0 < float((found - meant).abs().max()) < ERRORS[kind] * float(meant.abs().max())
    torch.testing.assert_close(found, unpacked, rtol=0, atol=1e-4)
    whole, theirs = load_t5(out, "float32", "cpu"), load_t5(source, "float32", "cpu")
    head, exact = whole.lm_head.weight, theirs.lm_head.weight
    assert not stays_quantised(whole) and float((head - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_norms_are_not_in_the_weights(tmp_path: Path) -> None:
    """A norm with large channels costs int8 nothing."""
    state = random_state(CONFIG)
    norm = "encoder.block.0.layer.1.layer_norm.weight"
    state[norm] = torch.where(torch.arange(CONFIG.d_model) % 50 == 0, 40.0, 0.5)
    source, out = write_hf_folder(tmp_path / "original", CONFIG, state), tmp_path / "out.safetensors"
    convert_quantised(source, out, "int8")
    name = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    found = examine(out).read(name)
    assert float((found - state[name]).abs().max()) < 0.01 * float(state[name].abs().max())
    wi = load_encoder(out, "float32", "cpu").state_dict()["encoder.block.0.layer.1.DenseReluDense.wi.weight"]
    assert torch.equal(wi[: CONFIG.d_ff], found * state[norm])


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    """Go into smaller blocks where there are some, and are else refused before anything is written."""
    odd = CONFIG.model_copy(update={"d_kv": 24, "num_heads": 4})
    source, out = write_hf_folder(tmp_path / "odd", odd, random_state(odd)), tmp_path / "out.safetensors"
    convert_quantised(source, out, "q4_k")
    assert kinds_in(load_encoder(out, "float32", "cpu")) == {"Q4_K", "Q8_0"}
    odd = CONFIG.model_copy(update={"d_kv": 10})
    source, other = write_hf_folder(tmp_path / "odder", odd, random_state(odd)), tmp_path / "other.safetensors"
    with pytest.raises(ValueError, match=r"SelfAttention\.o\.weight: rows of 40 numbers are no whole blocks"):
        convert_quantised(source, other, "q8_0")
    assert not other.exists()
    convert_quantised(source, other, "int8")


@pytest.mark.parametrize("kind", PACKED_KINDS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float32])
def test_rows_of_the_table_that_are_not_finite(
    tmp_path: Path, kind: PackedKind, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """Float8 files have NaN where an unused row of the original was beyond float8."""
    state = random_state(CONFIG)
    table = state["shared.weight"].to(dtype).float()
    assert not torch.isin(IDS, torch.tensor([37, 40])).any()
    table[37, 3], table[40] = torch.nan, torch.nan
    state["shared.weight"] = table.to(dtype)
    source = write_hf_folder(tmp_path / "original", CONFIG, state)
    convert_quantised(source, out := tmp_path / "out.safetensors", kind, encoder_only=True)
    stack = load_encoder(out, "float32", "cpu")
    with torch.no_grad():
        found, meant = (model(IDS, MASK) for model in (stack, load_encoder(source, "float32", "cpu")))
        embedded = stack.shared(torch.arange(CONFIG.vocab_size))
    assert float((found - meant).abs().max()) < ERRORS[kind] * float(meant.abs().max())
    if kind == "float8":  # leaves the table as it is
        assert embedded[40].isnan().all() and caplog.messages == []
    else:
        assert not embedded[[37, 40]].any() and embedded.isfinite().all()
        told = "2 rows of shared.weight hold NaN or infinity, such as 37; they are written as zeros"
        assert caplog.messages == [told]


@pytest.mark.parametrize("kind", PACKED_KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_projection_that_is_not_finite_is_refused(tmp_path: Path, kind: PackedKind, value: float) -> None:
    state, name = random_state(CONFIG), "encoder.block.1.layer.0.SelfAttention.k.weight"
    state[name][5, 7] = value
    source = write_hf_folder(tmp_path / "original", CONFIG, state)
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinity, in 1 rows of which the first is 5"):
        convert_quantised(source, tmp_path / "out.safetensors", kind, encoder_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


@pytest.mark.parametrize("kind", ["q8_0", "q4_k"])
def test_a_weight_beyond_the_scales_of_a_kind_is_refused(tmp_path: Path, kind: PackedKind) -> None:
    state, name = random_state(CONFIG), "encoder.block.1.layer.0.SelfAttention.k.weight"
    state[name][5, 7] = 1e9
    source = write_hf_folder(tmp_path / "original", CONFIG, state)
    with pytest.raises(CheckpointError, match=rf"{name} reaches 1e\+09, which {kind} cannot hold .*take another kind"):
        convert_quantised(source, tmp_path / "out.safetensors", kind, encoder_only=True)
    convert_quantised(source, tmp_path / "out.safetensors", "int8", encoder_only=True)
    load_encoder(tmp_path / "out.safetensors", "float32", "cpu")


def test_eight_bits_are_computed_of_the_very_bytes(tmp_path: Path) -> None:
    """Quantising the activations, too, rounds no weight again."""
    convert_quantised(original(tmp_path), out := tmp_path / "out.safetensors", "int8")
    stack = load_encoder(out, "float32", "cpu")
    if reason := why_not_int8(stack):
        pytest.skip(reason)
    before = stack.state_dict()
    after = quantize_int8(stack, "onednn").state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-6)


def test_what_is_refused(tmp_path: Path) -> None:
    source = original(tmp_path)
    with pytest.raises(ValueError, match="quantize='q3_k'; allowed: int8, q8_0, q4_k, float8"):
        convert_quantised(source, tmp_path / "out.safetensors", "q3_k")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert_quantised(source, source / "model.safetensors", "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_the_command(run: Run, tmp_path: Path) -> None:  # noqa: F811
    config = CONFIG.model_copy(update={"vocab_size": 4096})
    source = write_file(tmp_path / "t5.safetensors", {**random_state(config), "spiece_model": spiece_tensor()})
    out = tmp_path / "out.safetensors"
    report = run("convert", source, out, "--quantize", "q8_0", "--json").json
    assert (report["dtype"], report["tokenizer"]) == ("q8_0", "sentencepiece")
    seen = run("inspect", out, "--json").json
    assert seen["dtypes"].keys() == {"Q8_0", "float32"} and seen["faults"] == []
    assert seen["encoder_memory"].keys() == {"as it lies", "float32", "bfloat16/float16"}
    encoder = TextEncoder.from_pretrained(out, "float32", "cpu")
    assert stays_quantised(encoder.stack)
    assert encoder.encode(["a cat"]).hidden_states.isfinite().all()
    refused = run("convert", source, out, "--quantize", "int8", "--dtype", "float16")
    assert refused.status == 2 and "--quantize goes without --dtype" in refused.stderr


def test_parity_tells_what_quantising_has_cost(run: Run, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("transformers")
    source, out = original(tmp_path), tmp_path / "out.safetensors"
    convert_quantised(source, out, "q8_0")
    options = ["--dtypes", "float32", "--against", "", "--prompt-lengths", "9,4", "--json"]
    largest = []
    for more in ([], ["--original", source]):
        report = run("parity", out, *options, *more)
        assert report.status == 0, report.stderr
        largest.append(max(found["largest"] for found in report.json["differences"]))
    assert largest[0] < 1e-5 < 1e-4 < largest[1]
    refused = run("parity", "--random", "t5-v1_1-small", "--original", source)
    assert refused.status == 2 and "--original goes with a model" in refused.stderr


def test_the_table_of_kinds() -> None:
    pytest.importorskip("gguf")
    rows = measure_kinds(CONFIG, torch.float32, (4,), 1)
    assert [row.kind for row in rows] == ["float32", *possible_kinds()]
    by_kind = {row.kind: row for row in rows}
    assert by_kind["float32"].errors == (0.0,) * 5 and by_kind["Q4_K"].bits == 4.5
    order = [by_kind[kind].errors[1] for kind in ("Q8_0", "Q5_1", "Q4_K")]
    assert order == sorted(order) and order[0] > 0
    table, notes = kinds_table(rows)
    shown = {cells[0]: cells for cells in table.rows}
    assert shown["Q4_K"][1] == "4.50" and all(len(cells) == len(table.headings) for cells in table.rows)
    assert all(row.kind in " ".join(notes) for row in rows)
    with pytest.raises(ValueError, match=r"unknown kinds \['Q9'\]; allowed: int8, int8-rotated, Q8_0"):
        measure_kinds(CONFIG, kinds=["Q9"])


def test_the_table_by_the_command(run: Run, tmp_path: Path) -> None:  # noqa: F811
    options = ["--layers", "1", "--kinds", "Q8_0", "--repeats", "1", "--dtype", "float32"]
    rows = run("bench-kinds", "t5-v1_1-small", *options, "--json").json["rows"]
    assert [row["kind"] for row in rows] == ["float32", "Q8_0"] and rows[1]["bits"] == 8.5
    assert all(row["milliseconds"] and min(row["milliseconds"]) > 0 for row in rows)
    file = tmp_path / "table.md"
    assert run("bench-kinds", "t5-v1_1-small", *options, "--markdown", file).status == 0
    headline, _, table, *computed = file.read_text().split("\n\n")
    assert headline == "t5-v1_1-small, 1 layer, computed in float32, medians of 1 encode"
    assert table.count("\n") == 3 and "(1.00)" in table
    assert rows[0]["tokens"] == [32, 128, 512] and rows[0]["ratios"] == [1.0, 1.0, 1.0]
    assert all(row["by"] in "".join(computed) and row["kind"] in "".join(computed) for row in rows)


def test_a_narrow_terminal_gets_every_figure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("COLUMNS", "40")
    options = ["--layers", "1", "--kinds", "float8_e4m3fn", "--repeats", "1", "--dtype", "float32"]
    shown = run("bench-kinds", "t5-v1_1-small", *options).stdout
    assert "float8_e4m3fn" in shown and "largest" in shown and "(1.00)" in shown and "…" not in shown


def test_size_against_accuracy_as_a_picture(run: Run, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("matplotlib")
    options = ["--layers", "1", "--kinds", "Q8_0,Q4_0", "--repeats", "1", "--dtype", "float32"]
    picture = tmp_path / "kinds.png"
    assert run("bench-kinds", "t5-v1_1-small", *options, "--plot", picture).status == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--against", "llama"], "kinds are compared with llama-cpp-python alone"),
        (["--against", "llama-cpp-python", "--plot", "kinds.png"], "leave one of them out"),
    ],
)
def test_what_kinds_are_not_compared_with(run: Run, options: list[str], told: str) -> None:  # noqa: F811
    refused = run("bench-kinds", "t5-v1_1-small", *options)
    assert refused.status == 2 and told in refused.stderr
