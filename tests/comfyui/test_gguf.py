"""GGUF files of T5 encoders, written here with the package gguf as llama.cpp's converter names them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_file
from comfy_toys import (
    PILE,
    V1_1,
    assert_equal_conditioning,
    conditioning,
    error,
    require_comfyui,
    toy_family,
    toy_state,
)
from torch import Tensor

from comfy_nai_t5.choices import Settings
from nai_t5_core.config import T5Config

require_comfyui()
gguf = pytest.importorskip("gguf", reason="reading GGUF files needs the package gguf")

NAMES = {
    "shared": "token_embd",
    "encoder.final_layer_norm": "enc.output_norm",
    "SelfAttention.q": "attn_q",
    "SelfAttention.k": "attn_k",
    "SelfAttention.v": "attn_v",
    "SelfAttention.o": "attn_o",
    "SelfAttention.relative_attention_bias": "attn_rel_b",
    "0.layer_norm": "attn_norm",
    "DenseReluDense.wi_0": "ffn_gate",
    "DenseReluDense.wi_1": "ffn_up",
    "DenseReluDense.wi": "ffn_up",
    "DenseReluDense.wo": "ffn_down",
    "1.layer_norm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    name = name.removesuffix(".weight")
    match = re.fullmatch(r"encoder\.block\.(\d+)\.layer\.(.+)", name)
    if match is None:
        return f"{NAMES[name]}.weight"
    part = match[2] if match[2].endswith("layer_norm") else match[2].partition(".")[2]
    return f"enc.blk.{match[1]}.{NAMES[part]}.weight"


def write_gguf(path: Path, state: dict[str, Tensor], kind: str) -> Path:
    """Matrices in a block format (whose rows are multiples of 32), everything else in float32."""
    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_block_count(3)
    quantisation = getattr(gguf.GGMLQuantizationType, kind)
    for name, tensor in state.items():
        values = tensor.float().numpy()
        is_matrix = tensor.ndim == 2 and "relative" not in name and tensor.shape[1] % 32 == 0
        if is_matrix and kind != "F32":
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    from comfy_nai_t5 import families, loaders

    monkeypatch.setitem(families.FAMILIES, family, toy_family(family))
    return loaders.load_t5(path, family, Settings("float32"))


@pytest.mark.parametrize(("family", "config"), [("mochi", V1_1), ("auraflow", PILE)])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_gguf(family: str, config: T5Config, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = toy_state(config)
    path = write_gguf(tmp_path / "t5.gguf", state, kind)
    loaded = conditioning(load(path, family, monkeypatch), "a cat")
    # What the package itself unpacks, in a safetensors file.
    meant = {name: tensor.clone() for name, tensor in state.items()}
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    for name in meant:
        tensor = stored[gguf_name(name)]
        meant[name] = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    expected = conditioning(load(write_file(tmp_path / "t5.safetensors", meant), family, monkeypatch), "a cat")
    # Beside weights of 16 bits, ComfyUI keeps the norms in 16 bits too.
    assert_equal_conditioning(loaded, expected, 1e-4 if kind == "F32" else 2e-2 if kind == "BF16" else 3e-3)
    original = conditioning(load(write_file(tmp_path / "original.safetensors", state), family, monkeypatch), "a cat")
    assert error(loaded["cond"], original["cond"]) < {"Q4_0": 1.0, "Q8_0": 0.1}.get(kind, 2e-2)


def test_gguf_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "t5.gguf", toy_state(V1_1), "F16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"needs the package gguf: install it with 'python -m pip install gguf'"):
        load(path, "mochi", monkeypatch)


def test_gguf_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_gguf(tmp_path / "t5.gguf", toy_state(V1_1), "F16").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in (4, 100, 600, len(whole) - 5000):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"damaged GGUF file .* fetch it again"):
            load(path, "mochi", monkeypatch)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="is no T5"):
        load(path, "mochi", monkeypatch)
