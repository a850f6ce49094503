"""A file of weights that has a tokenizer inside is a tokenizer's file as well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import spiece_model, spiece_tensor, write_file
from conftest import TOY_CONFIGS, random_state, write_hf_folder

from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.tokenizer import SentencePieceTokenizer, load_tokenizer, sentencepiece_to_tokenizer_json
from nai_t5_core.weights.convert import convert

CONFIG = TOY_CONFIGS["v1.1"].model_copy(update={"vocab_size": 4096})
TEXTS = ["a cat", "two dogs\nand a <extra_id_0>", ""]


@pytest.mark.parametrize("kind", ["spiece.model", "tokenizer.json"])
def test_our_own_converted_file_is_taken(kind: str, tmp_path: Path) -> None:
    content = spiece_model() if kind == "spiece.model" else sentencepiece_to_tokenizer_json(spiece_model())
    folder = write_hf_folder(tmp_path / "t5", CONFIG, random_state(CONFIG))
    bare = TextEncoder.from_pretrained  # weights that come without a tokenizer
    with pytest.raises(ValueError, match="comes without a tokenizer"):
        bare(folder / "model.safetensors")
    (folder / kind).write_bytes(content)
    converted = tmp_path / "converted" / "t5.safetensors"
    converted.parent.mkdir()
    convert(folder, converted)
    (folder / kind).unlink()
    expected = SentencePieceTokenizer(spiece_model())
    for source in (converted, str(converted), converted.parent):
        tokenizer = load_tokenizer(source)
        assert tokenizer.serialized() == (tokenizer.kind, content)
        assert [tokenizer.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]
        assert bare(folder / "model.safetensors", tokenizer=source).encode(["a cat"]).token_counts == [3]


def test_files_of_comfyui_are_taken(tmp_path: Path) -> None:
    weights = {"text_encoders.t5xxl.transformer.shared.weight": torch.zeros(2, 2, dtype=torch.float8_e4m3fn)}
    file = write_file(tmp_path / "all.safetensors", {**weights, "text_encoders.spiece_model": spiece_tensor()})
    assert load_tokenizer(file).serialized() == ("sentencepiece", spiece_model())


def test_what_has_no_tokenizer_is_refused(tmp_path: Path) -> None:
    weight = {"shared.weight": torch.zeros(2, 2)}
    with pytest.raises(
        ValueError, match=r"none.safetensors' has no tokenizer inside: give a tokenizer.json, a Sentence"
    ):
        load_tokenizer(write_file(tmp_path / "none.safetensors", weight))
    two = {"a.spiece_model": spiece_tensor(), "b.spiece_model": spiece_tensor()}
    with pytest.raises(ValueError, match=r"has 2 tokenizers \(a.spiece_model, b.spiece_model\) inside"):
        load_tokenizer(write_file(tmp_path / "two.safetensors", two))
    cast = {"spiece_model": spiece_tensor().half()}
    with pytest.raises(ValueError, match=r"was cast to float16, and is lost; give that of the original"):
        load_tokenizer(write_file(tmp_path / "cast.safetensors", cast))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((20).to_bytes(8, "little") + b"{" + b"x" * 40)
    with pytest.raises(ValueError, match=r"damaged.safetensors' cannot be read as safetensors"):
        load_tokenizer(damaged)
