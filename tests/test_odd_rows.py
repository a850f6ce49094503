"""NaN and infinity in rows of the embedding, as published float8 files have them: only prompts that use a row are told.

Everything that reads the table is held to it: loading, scales, conversion, calibration, the node pack.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import encoder_part, spiece_model, write_file
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from torch import Tensor

from comfy_nai_t5.checkpoint import read_checkpoint
from nai_t5_core.facts.config import T5Config
from nai_t5_core.float16.guard import NotFiniteError, encode_guarded
from nai_t5_core.model.encoder import LAYOUTS, Layout
from nai_t5_core.model.precision import keeps_finite, largest_finite
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.weights.calibrate import calibrate
from nai_t5_core.weights.convert import convert
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.load import load_encoder, load_t5

V1_1 = TOY_CONFIGS["v1.1"]
ODD = {7: float("nan"), 90: float("inf"), 95: float("-inf")}
MASK = padding_mask([9, 4, 1], 9)
# Without the odd rows, which stand at the pads alone.
IDS = torch.randint(8, 90, (3, 9), generator=torch.Generator().manual_seed(3)).masked_fill(MASK == 0, 7)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def odd_state(dtype: torch.dtype, config: T5Config = V1_1, factor: float = 1.0) -> dict[str, Tensor]:
    """An encoder in a dtype, whose table is multiplied by a factor and has odd rows."""
    state = encoder_part(random_state(config))
    state["shared.weight"] = state["shared.weight"] * factor
    for row, value in ODD.items():
        state["shared.weight"][row, ::3] = value
    # Of these, only float8_e4m3fn knows no infinity, and has its largest number there.
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def written(folder: Path, dtype: torch.dtype, config: T5Config = V1_1, factor: float = 1.0) -> Path:
    return write_file(folder / "t5.safetensors", odd_state(dtype, config, factor))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_prompt_that_does_not_use_them(tmp_path: Path, dtype: torch.dtype, model_dtype: str, layout: Layout) -> None:
    stack = load_encoder(written(tmp_path, dtype), model_dtype, "cpu", layout)
    meant = {name: tensor.float() for name, tensor in odd_state(dtype).items()}
    expected = build_stack(V1_1, meant)(IDS, MASK, padding="skip")
    out = encode_guarded(stack, IDS, MASK, padding="skip")
    tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}[model_dtype]
    assert float((out.float() - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_prompt_that_uses_them_is_told(tmp_path: Path, dtype: str, layout: Layout) -> None:
    stack = load_encoder(written(tmp_path, torch.float32), dtype, "cpu", layout)
    ids = IDS.clone()
    ids[0, 2], ids[1, 1], ids[1, 2] = 95, 7, 95
    expected = r"shared.weight holds values that are not finite, in rows of tokens that the text has: 7, 95"
    with pytest.raises(NotFiniteError, match=expected):
        encode_guarded(stack, ids, MASK, padding="skip")
    with pytest.raises(NotFiniteError, match=expected):
        encode_guarded(stack, input_ids=ids, attention_mask=MASK, padding="skip")


@torch.no_grad()
def test_a_table_beyond_float16_gets_the_scale_of_its_finite_rows(tmp_path: Path) -> None:
    stack = load_encoder(written(tmp_path, torch.float32, factor=1e5), "float16", "cpu")
    meant = odd_state(torch.float32, factor=1e5)
    largest = float(meant["shared.weight"].nan_to_num(nan=0, posinf=0, neginf=0).abs().max())
    assert 0.5 * 65504 < largest * stack.scales.embedding <= 65504
    expected = build_stack(V1_1, meant)(IDS, MASK, padding="skip")
    out = encode_guarded(stack, IDS, MASK, padding="skip")
    assert float((out.float() - expected).abs().max() / expected.abs().max()) < 2e-2


@torch.no_grad()
def test_scaled_float8_beyond_float16(tmp_path: Path) -> None:
    state = odd_state(torch.float32)
    table = state["shared.weight"]
    scale = torch.tensor(1e4)
    state |= {"shared.weight": (table * 10).to(torch.float8_e4m3fn), "shared.scale_weight": scale}
    stack = load_encoder(write_file(tmp_path / "t5.safetensors", state), "float16", "cpu")
    assert stack.scales.embedding < 1
    assert torch.isfinite(encode_guarded(stack, IDS, MASK, padding="skip")).all()


def test_a_table_that_overflows_is_still_refused(tmp_path: Path) -> None:
    """Rows that were finite must stay so."""
    stored = load_encoder(written(tmp_path, torch.float32, factor=1e5), "float16", "cpu").scales
    with pytest.raises(CheckpointError, match=r"shared.weight has values that are not finite in torch.float16"):
        load_encoder(written(tmp_path, torch.float32, factor=1e9), "float16", "cpu", scales=stored)


@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16"])
def test_conversion_keeps_them(tmp_path: Path, dtype: str) -> None:
    out = convert(written(tmp_path, torch.float32), tmp_path / "own.safetensors", dtype).out
    stack = load_encoder(out, "float16", "cpu")
    with torch.no_grad():
        expected = build_stack(V1_1, odd_state(torch.float32))(IDS, MASK, padding="skip")
        out_ = encode_guarded(stack, IDS, MASK, padding="skip")
    assert float((out_.float() - expected).abs().max() / expected.abs().max()) < 6e-2
    with pytest.raises(NotFiniteError, match="tokens that the text has: 90"):
        encode_guarded(stack, torch.full((1, 3), 90))


def test_damage_elsewhere_is_not_kept(tmp_path: Path) -> None:
    state = encoder_part(random_state(V1_1))
    state["encoder.block.1.layer.1.DenseReluDense.wo.weight"][3, 4] = float("nan")
    file = write_file(tmp_path / "t5.safetensors", state)
    with pytest.raises(CheckpointError, match=r"wo.weight has values that are not finite in torch.float32"):
        convert(file, tmp_path / "own.safetensors")
    assert not (tmp_path / "own.safetensors").exists()


def with_tokenizer(folder: Path, dtype: torch.dtype, rows: tuple[int, ...]) -> tuple[Path, T5Config]:
    """A model of the tokenizer that the tests have, with NaN in some rows of its table."""
    config = V1_1.encoder_only().model_copy(update={"vocab_size": 4100})
    state = random_state(config)
    state["shared.weight"][list(rows)] = float("nan")
    write_file(folder / "model.safetensors", {name: tensor.to(dtype) for name, tensor in state.items()})
    (folder / "spiece.model").write_bytes(spiece_model())
    return folder, config


@pytest.mark.parametrize("dtype", DTYPES)
def test_calibration_looks_at_the_finite_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    folder, _ = with_tokenizer(tmp_path / "odd", dtype, (4097, 4099))
    whole, _ = with_tokenizer(tmp_path / "whole", dtype, ())
    found, expected = calibrate(folder, ["a cat", "a red cat"]), calibrate(whole, ["a cat", "a red cat"])
    assert found.encoder.scales == expected.encoder.scales
    assert [layer.maxima for layer in found.encoder.layers] == [layer.maxima for layer in expected.encoder.layers]


def test_calibration_is_told_of_rows_that_its_prompts_use(tmp_path: Path) -> None:
    folder, _ = with_tokenizer(tmp_path, torch.float32, (1, 4099))  # the end token
    with pytest.raises(CheckpointError, match="in the rows of the tokens 1, which the prompts use"):
        calibrate(folder, ["a cat"])


def test_calibration_is_told_of_damage(tmp_path: Path) -> None:
    folder, config = with_tokenizer(tmp_path, torch.float32, ())
    state = random_state(config)
    state["encoder.block.1.layer.0.SelfAttention.o.weight"][3, 4] = float("inf")
    write_file(folder / "model.safetensors", state)
    with pytest.raises(CheckpointError, match=r"block.1.layer.0.SelfAttention.o.weight holds values that are n"):
        calibrate(folder, ["a cat"])


@pytest.mark.parametrize("optimize", [False, True])
def test_a_text_encoder_is_told(tmp_path: Path, optimize: bool) -> None:
    folder, _ = with_tokenizer(tmp_path, torch.float32, (4099,))
    encoder = TextEncoder.from_pretrained(folder, dtype="float32", device="cpu", optimize=optimize)
    used = encoder.tokenizer(["a cat"]).input_ids[0]
    with torch.no_grad():
        encoder.stack.shared.weight[used[0]] = float("nan")
    assert torch.isfinite(encoder.encode(["the"]).hidden_states).all()
    with pytest.raises(NotFiniteError, match=f"in rows of tokens that the text has: {used[0]}"):
        encoder.encode(["a cat", "the"])


def test_a_whole_t5_loads(tmp_path: Path) -> None:
    state = random_state(V1_1)
    state["shared.weight"][7] = float("nan")
    model = load_t5(write_file(tmp_path / "t5.safetensors", state), "float16", "cpu")
    assert torch.isfinite(model.encoder_stack.shared.weight[8]).all()


def test_the_node_pack_reads_them(tmp_path: Path) -> None:
    state = odd_state(torch.bfloat16)
    read = read_checkpoint(write_file(tmp_path / "t5.safetensors", state)).state
    assert torch.equal(read["shared.weight"].view(torch.int16), state["shared.weight"].view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_measures(dtype: torch.dtype) -> None:
    odd = float("nan") if dtype == torch.float8_e4m3fn else float("inf")
    table = torch.tensor([[1.0, -3.0], [float("nan"), 2.0], [odd, 0.5]]).to(dtype)
    assert largest_finite(table) == 3
    assert largest_finite(table[:1]) == 3
    assert largest_finite(torch.full((2, 2), float("nan")).to(dtype)) == 0
    assert keeps_finite(table, table.float())
    assert keeps_finite(table, torch.tensor([[1.0, -3.0], [0.0, 2.0], [float("nan"), 0.5]]))
    assert not keeps_finite(table, torch.tensor([[1.0, float("inf")], [0.0, 2.0], [0.0, 0.5]]))
