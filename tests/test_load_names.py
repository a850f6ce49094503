"""T5 encoders under other names than Hugging Face's, and ByT5 with more tokens, by their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import State, encoder_part, prefixed, write_file
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from torch import Tensor

from comfy_nai_t5.checkpoint import holds_t5, read_checkpoint
from nai_t5_core.facts.config import config_to_hf, named_config
from nai_t5_core.model.encoder import LAYOUTS, Layout, T5EncoderStack
from nai_t5_core.tokenizer import ByteTokenizer
from nai_t5_core.weights.examine import ModelSource, examine, find_tokenizer
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.load import load, load_encoder

V1_1 = TOY_CONFIGS["v1.1"]
UMT5 = TOY_CONFIGS["umt5"].encoder_only()
IDS = torch.randint(0, 96, (3, 9), generator=torch.Generator().manual_seed(3))
MASK = padding_mask([9, 4, 1], 9)


def on_cpu(source: ModelSource, layout: Layout = "fused", subfolder: str = "") -> T5EncoderStack:
    return load_encoder(source, torch.float32, "cpu", layout, subfolder)


@torch.no_grad()
def output(stack: T5EncoderStack) -> Tensor:
    out: Tensor = stack(IDS, MASK)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------
WAN_NAMES = {
    "shared": "token_embedding",
    "final_layer_norm": "norm",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.SelfAttention": "attn",
    "layer.0.layer_norm": "norm1",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
    "encoder.block": "blocks",
    "encoder.": "",
}


def wan_named(state: State) -> dict[str, Tensor]:
    """An encoder's tensors as Wan's own code calls them."""
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in WAN_NAMES.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def stack_named(state: State) -> dict[str, Tensor]:
    """As transformers' T5Stack calls them by itself."""
    return {name.replace("shared.", "embed_tokens.").removeprefix("encoder."): tensor for name, tensor in state.items()}


def saved_by_torch(path: Path, state: State) -> Path:
    torch.save(dict(state), path)
    return path


def cast(state: State, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def scaled_rows(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Float8 with a scale for each row, beside Wan's names, and what it stands for."""
    stored, meant = {}, {}
    for name, tensor in state.items():
        if tensor.ndim == 1 or "pos_embedding" in name or name.startswith("token"):
            stored[name] = meant[name] = tensor
            continue
        scale = tensor.abs().amax(1, keepdim=True) / 448
        stored[name], stored[f"{name}_scale"] = (tensor / scale).to(torch.float8_e4m3fn), scale
        meant[name] = stored[name].float() * scale
    return stored, meant


def test_the_names_that_wan_uses() -> None:
    names = set(wan_named(random_state(UMT5)))
    block = ("norm1", "norm2", "attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate.0", "ffn.fc1", "ffn.fc2")
    block = (*block, "pos_embedding.embedding")
    assert names == {"token_embedding.weight", "norm.weight"} | {
        f"blocks.{layer}.{module}.weight" for layer in range(3) for module in block
    }


WAN_FILES: dict[str, tuple[Callable[[Path, State], Path], torch.dtype]] = {
    ".pth": (lambda path, state: saved_by_torch(path / "models_t5_umt5-xxl-enc.pth", state), torch.float32),
    ".pth in bfloat16": (lambda path, state: saved_by_torch(path / "t5.pth", state), torch.bfloat16),
    "safetensors in bfloat16": (lambda path, state: write_file(path / "t5.safetensors", state), torch.bfloat16),
    "safetensors in float8": (lambda path, state: write_file(path / "t5.safetensors", state), torch.float8_e4m3fn),
    "safetensors in the other float8": (
        lambda path, state: write_file(path / "t5.safetensors", state),
        torch.float8_e5m2,
    ),
    "under a prefix": (
        lambda path, state: write_file(path / "t5.safetensors", prefixed(state, "text_encoder.model.")),
        torch.float32,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("file", WAN_FILES)
@torch.no_grad()
def test_umt5_in_the_names_of_wan(tmp_path: Path, file: str, layout: Layout) -> None:
    """By value: transformers' UMT5 with the weights that the file stands for."""
    transformers = pytest.importorskip("transformers")
    write, dtype = WAN_FILES[file]
    torch.manual_seed(0)
    theirs = transformers.UMT5EncoderModel(transformers.UMT5Config(**config_to_hf(UMT5))).eval()
    stored = cast(encoder_part(random_state(UMT5)), dtype)
    theirs.load_state_dict(cast(stored, torch.float32), strict=False)
    loaded = load(write(tmp_path, wan_named(stored)), torch.float32, "cpu", layout)
    torch.testing.assert_close(output(loaded.stack), theirs(IDS, MASK).last_hidden_state, rtol=1e-4, atol=1e-4)
    # A toy's vocabulary is that of a Pile-T5, whose pad and end tokens are others.
    assert loaded.stack.config.model_copy(update={"pad_token_id": 0, "eos_token_id": 1}) == UMT5
    assert loaded.report.ignored == {}
    assert len(loaded.report.used) == len(stored)


def test_scaled_float8_in_the_names_of_wan(tmp_path: Path) -> None:
    stored, meant = scaled_rows(wan_named(random_state(UMT5)))
    loaded = load(write_file(tmp_path / "t5.safetensors", stored), torch.float32, "cpu", unpack=True)
    expected = on_cpu(write_file(tmp_path / "meant.safetensors", meant))
    assert torch.equal(output(loaded.stack), output(expected))
    assert loaded.report.ignored == {}


@pytest.mark.parametrize("kind", ["v1.0", "v1.1", "umt5", "byt5"])
def test_a_bare_stack(tmp_path: Path, kind: str) -> None:
    config = TOY_CONFIGS[kind]
    state = encoder_part(random_state(config))
    stack = on_cpu(write_file(tmp_path / "stack.safetensors", stack_named(state)))
    assert torch.equal(output(stack), output(build_stack(config, state)))


def test_a_stack_that_transformers_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**config_to_hf(V1_1))).eval()
    torch.save(model.encoder.state_dict(), tmp_path / "stack.pt")
    with torch.no_grad():
        expected = model(IDS, MASK).last_hidden_state
    torch.testing.assert_close(output(on_cpu(tmp_path / "stack.pt")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rename", [wan_named, stack_named])
def test_foreign_names_in_the_node_pack(tmp_path: Path, rename: Callable[[State], dict[str, Tensor]]) -> None:
    state = encoder_part(random_state(UMT5))
    file = write_file(tmp_path / "t5.safetensors", rename(state))
    assert holds_t5(file)
    read = read_checkpoint(file).state
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_other_models_with_blocks_are_no_t5(tmp_path: Path) -> None:
    file = write_file(tmp_path / "dit.safetensors", {"blocks.0.attn.q.weight": torch.zeros(2, 2)})
    assert not holds_t5(file)
    with pytest.raises(CheckpointError, match=r"is no T5: it begins with blocks.0.attn.q.weight"):
        examine(file)


def test_faults_in_the_names_of_wan(tmp_path: Path) -> None:
    state = wan_named(random_state(UMT5))
    state["blocks.1.attn.q.bias"] = torch.zeros(64)
    del state["blocks.2.ffn.fc1.weight"]
    with pytest.raises(CheckpointError, match=r"(?s)2 faults:.*block.2.*wi_1.weight is missing.*blocks.1.attn.q.bias"):
        on_cpu(write_file(tmp_path / "t5.safetensors", state))


# ---------------------------------------------------------------------------------------------------------------------
# ByT5
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [384, 400, 1510])
def test_byt5_with_more_tokens(tmp_path: Path, rows: int) -> None:
    config = TOY_CONFIGS["byt5"].model_copy(update={"vocab_size": rows})
    file = write_file(tmp_path / "byt5.safetensors", encoder_part(random_state(config)))
    examination = examine(file)
    assert (examination.config.kind, examination.config.vocab_size) == ("ByT5", rows)
    tokenizer = find_tokenizer(examination)
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer(["a"]).input_ids == [[100, 1]]


def test_sizes_and_kinds_of_byt5() -> None:
    for rows in (384, 1510, 5000):
        config = named_config("byt5-small").model_copy(update={"vocab_size": rows})
        assert (config.kind, config.size_name) == ("ByT5", "byt5-small")
    for rows in (385, 1096, 4096):
        small = named_config("t5-v1_1-small").model_copy(update={"vocab_size": rows})
        assert (small.kind, small.size_name) == ("T5 v1.1", "t5-v1_1-small")
    assert V1_1.kind == "T5 v1.1"
    assert TOY_CONFIGS["umt5"].model_copy(update={"vocab_size": 1510}).kind == "Pile-T5"
