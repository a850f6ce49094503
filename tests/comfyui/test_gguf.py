"""GGUF files of T5 encoders, and the tokenizer in them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import spiece_model, write_file
from comfy_toys import (
    PILE,
    UMT5,
    V1_1,
    assert_equal_conditioning,
    conditioning,
    error,
    require_comfyui,
    toy_family,
    toy_file,
    toy_state,
)
from conftest import random_state
from toy_gguf import ODD_TEXTS, gguf, gguf_name, random_texts, write_gguf, write_tensors

from comfy_nai_t5.choices import Settings
from nai_t5_core.facts.config import T5Config

require_comfyui()


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


@pytest.mark.parametrize("family", ["wan", "ace"])
def test_the_tokenizer_of_a_gguf_file(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "umt5.gguf", random_state(UMT5), "F32", spiece_model())
    loaded, expected = load(path, family, monkeypatch), load(toy_file(tmp_path, UMT5), family, monkeypatch)
    for text in (*ODD_TEXTS, *random_texts(50)):
        assert loaded.tokenize(text) == expected.tokenize(text)
    for text in ODD_TEXTS:
        assert_equal_conditioning(conditioning(loaded, text), conditioning(expected, text))


def test_gguf_without_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "umt5.gguf", random_state(UMT5), "F16")
    with pytest.raises(ValueError, match=r"umt5\.gguf comes without its tokenizer; choose a safetensors file"):
        load(path, "wan", monkeypatch)
    with pytest.raises(ValueError, match=r"spiece\.model beside the weights, or choose the model family"):
        load(path, "t5", monkeypatch)
    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["a"])
    write_tensors(writer, random_state(UMT5), "F16")
    with pytest.raises(ValueError, match="without its tokenizer"):
        load(path, "wan", monkeypatch)


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
