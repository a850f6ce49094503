"""Exports a trained model: the Hugging Face layout, and our own single file, converted from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nai_t5_core.backends.sharding import whole
from nai_t5_core.facts.config import config_to_hf, decoder_tensors, encoder_tensors
from nai_t5_core.generation.t5 import T5
from nai_t5_core.tokenizer import Tokenizer
from nai_t5_core.weights.convert import convert
from nai_t5_core.weights.formats import write_safetensors
from nai_t5_core.weights.whole_files import write_whole

HF_FOLDER, NATIVE_FILE = "hf", "model.safetensors"
# The file that transformers looks for in a folder, by the kind of tokenizer.
_TOKENIZER_FILES = {"sentencepiece": "spiece.model", "tokenizer.json": "tokenizer.json"}


def export(model: T5, tokenizer: Tokenizer, out: Path, dtype: str, is_writer: bool = True) -> tuple[Path, Path]:
    """Writes ``out/hf`` in float32 and ``out/model.safetensors`` in ``dtype``; returns both paths.

    All processes of a sharded run call this; the one with ``is_writer`` writes.
    """
    folder, file = out / HF_FOLDER, out / NATIVE_FILE
    if is_writer:
        write_hf(model, tokenizer, folder)
        convert(folder, file, dtype)
    else:
        for _ in _original_tensors(model):
            pass
    return folder, file


def _original_tensors(model: T5) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model in the separate layout, in float32 and gathered from all processes."""
    assert model.layout == "separate", "a fused model has not the original tensors"
    state = model.state_dict()
    for name in encoder_tensors(model.config) | decoder_tensors(model.config):
        yield name, whole(state[name]).float()


def write_hf(model: T5, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes weights, config.json and tokenizer of a model in the separate layout, as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = encoder_tensors(model.config) | decoder_tensors(model.config)
    layout = {name: (torch.float32, shape) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", layout, _original_tensors(model), {"format": "pt"})
    config = json.dumps(config_to_hf(model.config), indent=2, sort_keys=True)
    write_whole(folder / "config.json", config + "\n")
    kind, content = tokenizer.serialized()
    if kind in _TOKENIZER_FILES:
        write_whole(folder / _TOKENIZER_FILES[kind], content)
    else:
        write_whole(folder / "tokenizer_config.json", '{"tokenizer_class": "ByT5Tokenizer"}\n')
