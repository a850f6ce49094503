"""Pipelines, shards and folders: the T5 is found, or the message says where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import State, encoder_part, spiece_model, write_file, write_shards
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state, write_hf_folder
from test_load_names import wan_named
from torch import Tensor

from comfy_nai_t5.checkpoint import holds_t5, read_checkpoint
from nai_t5_core.model.encoder import Layout, T5EncoderStack
from nai_t5_core.weights.convert import convert
from nai_t5_core.weights.examine import ModelSource, find_tokenizer_for
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.load import load_encoder

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


def pipeline(folder: Path, state: State, with_index: bool = True) -> Path:
    clip = {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(1)}
    write_file(folder / "text_encoder" / "model.safetensors", clip)
    write_hf_folder(folder / "text_encoder_2", V1_1.encoder_only(), encoder_part(state))
    if with_index:
        (folder / "model_index.json").write_text("{}")
    return folder


PLACES: dict[str, tuple[bool, str, str]] = {
    "a pipeline": (True, "", "is a whole pipeline"),
    "a folder of subfolders": (False, "", "holds no weights"),
    "the folder of CLIP": (True, "text_encoder", "looks like a CLIP text encoder"),
    "a folder that is not there": (True, "text_encoder_3", "text_encoder_3 does not exist"),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_subfolder_of_the_t5_is_named(tmp_path: Path, case: str) -> None:
    with_index, subfolder, expected = PLACES[case]
    folder = pipeline(tmp_path / "flux", random_state(V1_1), with_index)
    with pytest.raises(
        CheckpointError, match=rf"(?s){expected}.*There is a T5 in subfolder='text_encoder_2' of {folder}$"
    ):
        on_cpu(folder, subfolder=subfolder)
    assert output(on_cpu(folder, subfolder="text_encoder_2")).shape == (3, 9, 64)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_one_shard_names_its_index(tmp_path: Path, kind: str) -> None:
    index = write_shards(tmp_path / "hf", random_state(V1_1), kind, count=2)
    shard = sorted(index.parent.glob(f"*00001-of-00002.{kind}"))[0]
    with pytest.raises(
        CheckpointError, match=rf"{shard.name} is one of 2 shards .*; give their index {index}, or the f"
    ):
        on_cpu(shard)
    assert holds_t5(shard)
    state = encoder_part(random_state(V1_1))
    read = read_checkpoint(shard).state
    assert all(torch.equal(read[name], state[name]) for name in state)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"is one of 2 shards .*; the index that lists them is not beside it"):
        on_cpu(shard)
    with pytest.raises(CheckpointError, match=r"2 of 2 shards .* without the index|holds no weights"):
        on_cpu(shard.parent)


def test_a_shard_among_other_files(tmp_path: Path) -> None:
    """In the node pack, whose folder of text encoders holds the files of many models."""
    index = write_shards(tmp_path, random_state(V1_1), count=2)
    write_file(tmp_path / "model.safetensors", {"something.else": torch.zeros(1)})
    state = encoder_part(random_state(V1_1))
    read = read_checkpoint(index.parent / "model-00002-of-00002.safetensors").state
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_the_only_shard_is_a_whole_file(tmp_path: Path) -> None:
    state = encoder_part(random_state(V1_1))
    file = write_file(tmp_path / "t5-00001-of-00001.safetensors", state)
    assert torch.equal(output(on_cpu(file)), output(build_stack(V1_1, state)))
    assert holds_t5(file)
    write_file(tmp_path / "model.safetensors", {"something.else": torch.zeros(1)})
    assert torch.equal(read_checkpoint(file).state["shared.weight"], state["shared.weight"])


def test_our_own_file_in_the_node_pack(tmp_path: Path, v1_1_folder: Path) -> None:
    (v1_1_folder / "spiece.model").write_bytes(spiece_model())
    own = convert(v1_1_folder, tmp_path / "own.safetensors", encoder_only=True).out
    assert holds_t5(own)
    assert find_tokenizer_for(own).serialized() == ("sentencepiece", spiece_model())


def wan_repository(folder: Path) -> Path:
    """Wan's own: the diffusion model in several files, the T5 as .pth, and its tokenizer two folders deep."""
    dit = {
        f"blocks.{layer}.{attn}.q.weight": torch.zeros(2, 2) for layer in (0, 1) for attn in ("self_attn", "cross_attn")
    }
    write_shards(folder, dit, count=2)
    torch.save(wan_named(random_state(UMT5)), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    tokenizer = folder / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True)
    (tokenizer / "spiece.model").write_bytes(spiece_model())
    return folder


def test_the_repository_of_wan(tmp_path: Path) -> None:
    folder = wan_repository(tmp_path / "Wan2.1-T2V-14B")
    file = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    with pytest.raises(CheckpointError, match=f"looks like a diffusion transformer.*There is a T5 in the file {file}$"):
        on_cpu(folder)
    assert find_tokenizer_for(file).serialized() == ("sentencepiece", spiece_model())


def test_a_folder_of_many_files_names_the_t5(tmp_path: Path) -> None:
    """As ComfyUI has them."""
    write_file(tmp_path / "clip_l.safetensors", {"text_model.encoder.layers.0.q": torch.zeros(1)})
    file = write_file(tmp_path / "t5xxl_fp16.safetensors", encoder_part(random_state(V1_1)))
    with pytest.raises(CheckpointError, match=f"holds 2 weight files.*There is a T5 in the file {file}$"):
        on_cpu(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt", "gguf"])
def test_a_file_that_is_absent_is_no_model_of_the_hub(suffix: str) -> None:
    with pytest.raises(CheckpointError, match=f"absent/t5.{suffix} does not exist"):
        on_cpu(f"absent/t5.{suffix}")
