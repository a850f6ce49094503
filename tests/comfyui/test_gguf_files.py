"""GGUF files under any name and with any numbers in rows that no prompt uses; needs no ComfyUI."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import encoder_part, write_file
from conftest import TOY_CONFIGS, random_state
from toy_gguf import gguf, write_gguf, write_tensors

from comfy_nai_t5.checkpoint import holds_t5, read_checkpoint
from nai_t5_core.weights.formats import CheckpointError

V1_1 = TOY_CONFIGS["v1.1"]


@pytest.mark.parametrize("name", ["t5xxl-00001-of-00001.gguf", "t5xxl-00001-of-00002.gguf", "t5xxl"])
def test_the_file_that_is_named_is_read(tmp_path: Path, name: str) -> None:
    """Beside others, as in ComfyUI's folder of text encoders."""
    state = encoder_part(random_state(V1_1))
    write_file(tmp_path / "model.safetensors", encoder_part(random_state(V1_1, seed=1)))
    path = write_gguf(tmp_path / name, state, "F32")
    assert holds_t5(path)
    read = read_checkpoint(path)
    assert read.examination.checkpoint.source == str(path)
    assert all(torch.equal(read.state[key], state[key]) for key in state)


def test_a_part_of_a_file_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "t5xxl-00001-of-00003.gguf", "t5encoder")
    writer.add_uint16("split.count", 3)
    write_tensors(writer, encoder_part(random_state(V1_1)), "F32")
    with pytest.raises(CheckpointError, match="is one of 3 parts of a GGUF file; join them with 'llama-gguf-split --m"):
        read_checkpoint(tmp_path / "t5xxl-00001-of-00003.gguf")


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_odd_rows(tmp_path: Path, kind: str) -> None:
    state = encoder_part(random_state(V1_1))
    state["shared.weight"][90, 3], state["shared.weight"][91, 4] = float("nan"), float("inf")
    read = read_checkpoint(write_gguf(tmp_path / "t5.gguf", state, kind)).state
    meant = state["shared.weight"] if kind == "F32" else state["shared.weight"].half()
    assert torch.equal(read["shared.weight"].nan_to_num(nan=9.0), meant.nan_to_num(nan=9.0).to(read["shared.weight"]))


def test_damage_elsewhere_is_refused(tmp_path: Path) -> None:
    state = encoder_part(random_state(V1_1))
    state["encoder.block.0.layer.0.SelfAttention.q.weight"][3, 4] = float("nan")
    with pytest.raises(CheckpointError, match=r"SelfAttention.q.weight beyond float16's range"):
        read_checkpoint(write_gguf(tmp_path / "t5.gguf", state, "F32"))
