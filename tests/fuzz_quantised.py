"""Readers of quantised files, each with a small whole one to damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import encoder_part
from conftest import random_state
from fuzz_damage import damaged_safetensors
from fuzz_files import CONFIG
from safetensors.torch import save
from toy_quantised import READ, quantised

from nai_t5_core.weights.convert_quantised import convert_quantised

# Rows of whole blocks.
BLOCKS = CONFIG.encoder_only().model_copy(
    update={"vocab_size": 16, "d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1}
)
_FILE = "t5.safetensors"
_KINDS = ("NVFP4", "MXFP8", "int8, rotated", "NF4", "NF4, not nested", "LLM.int8", "float8, in blocks")


def quantised_files(folder: Path) -> dict[str, tuple[str, bytes, Callable[[bytes], Any]]]:
    """By the reader's name: the file's name, its content, and the damage."""
    state = encoder_part(random_state(BLOCKS))
    torch.manual_seed(0)
    files = {name: save(quantised(state, READ[name][1])) for name in _KINDS}
    (folder / "plain.safetensors").write_bytes(save(state))
    convert_quantised(folder / "plain.safetensors", folder / "own_q8.safetensors", "q8_0")
    files["our own, quantised"] = (folder / "own_q8.safetensors").read_bytes()
    return {name: (_FILE, content, damaged_safetensors) for name, content in files.items()}
