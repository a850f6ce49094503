"""Toy checkpoints in every form that people have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nai_t5_core.facts.config import config_to_hf, encoder_tensors
from nai_t5_core.weights.examine import examine, find_tokenizer

State = Mapping[str, Tensor]


def write_file(path: Path, state: State) -> Path:
    """One safetensors file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), path)
    return path


def write_shards(folder: Path, state: State, kind: str = "safetensors", count: int = 3) -> Path:
    """A sharded checkpoint with its index; returns the index file. ``kind`` is "safetensors" or "bin"."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = sorted(state)
    weight_map = {}
    for number in range(count):
        file = f"{stem}-{number + 1:05}-of-{count:05}.{kind}"
        part = {name: state[name] for name in names[number::count]}
        weight_map |= dict.fromkeys(part, file)
        if kind == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=2))
    return index


def prefixed(state: State, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def encoder_part(state: State) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(("shared.", "encoder."))}


def scaled_float8(state: State, spelling: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """ComfyUI's scaled float8 file of a state, and the float32 weights that it stands for."""
    stored: dict[str, Tensor] = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    meant = {}
    for name, tensor in state.items():
        if tensor.ndim == 1 or "bias" in name or name == "shared.weight":
            stored[name] = meant[name] = tensor
            continue
        scale = tensor.abs().max() / 448
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[name.replace(".weight", f".{spelling}")] = scale
        meant[name] = stored[name].float() * scale
    return stored, meant


@cache
def spiece_model() -> bytes:
    """A small SentencePiece model: that of the embedded checkpoint, 4096 tokens."""
    tokenizer = find_tokenizer(examine())
    assert tokenizer is not None
    kind, content = tokenizer.serialized()
    assert kind == "sentencepiece"
    return content


def spiece_tensor() -> Tensor:
    return torch.frombuffer(bytearray(spiece_model()), dtype=torch.uint8)


def embedded_taken_apart(folder: Path) -> Path:
    """A Hugging Face folder with the embedded encoder's weights out of their joined tensors, again in float16.

    These are what ComfyUI's modules hold of it: taking apart and keeping in float16 is one rounding more.
    """
    examination = examine()
    config = examination.config.encoder_only()
    write_file(folder / "model.safetensors", {name: examination.read(name).half() for name in encoder_tensors(config)})
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    (folder / "spiece.model").write_bytes(spiece_model())
    return folder
