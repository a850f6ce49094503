"""GGUF files of T5 encoders, and the tokenizer in them."""

from __future__ import annotations

import random
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
from toy_gguf import add_tokenizer, gguf, gguf_name, write_gguf, write_tensors

from comfy_nai_t5.checkpoint import read_checkpoint
from comfy_nai_t5.choices import Settings
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.gguf_header import read_header
from nai_t5_core.tokenizer import SentencePieceTokenizer
from nai_t5_core.tokenizer.sentencepiece_format import (
    ADD_DUMMY_PREFIX,
    CHARSMAP,
    NORMALIZER_SPEC,
    REMOVE_EXTRA_WHITESPACES,
    SentencePieceModel,
    write_field,
)

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


ODD_TEXTS = (
    "a photo of a cat, highly detailed, 8k",
    "",
    "  two  spaces\tand\n\nlines ",
    "Ünïcode, ﬁne ligatures, ＦＵＬＬ width, e\u0301 and é",
    "猫 と 犬 — نص عربي и текст 😀👩‍🚀",
    "</s> <pad> <extra_id_0> <unk> ▁",
    "(weights:1.3) of [many] ((kinds:0.2))",
    "\u200b\ufeff\u00a0\u2003 zero \x7f width",
    "1234567890 3.14 x² ½ ①",
)


def random_texts(count: int, length: int = 40) -> list[str]:
    """Any characters at all, but those that stand for no character."""
    draw = random.Random(0)
    ranges = (range(32, 127), range(160, 0x250), range(0x370, 0x700), range(0x2000, 0x2100), range(0x4E00, 0x9FFF))
    return ["".join(chr(draw.choice(draw.choice(ranges))) for _ in range(length)) for _ in range(count)]


def changed(**facts: Any) -> bytes:
    """The toy tokenizer's file with other normalisation: of a field that is there twice, the last counts."""
    fields = {"add_dummy_prefix": ADD_DUMMY_PREFIX, "remove_extra_whitespaces": REMOVE_EXTRA_WHITESPACES}
    fields["charsmap"] = CHARSMAP
    return spiece_model() + write_field(
        NORMALIZER_SPEC, b"".join(write_field(fields[name], value) for name, value in facts.items())
    )


@pytest.mark.parametrize("family", ["wan", "ace"])
def test_the_tokenizer_of_a_gguf_file(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "umt5.gguf", random_state(UMT5), "F32", spiece_model())
    loaded, expected = load(path, family, monkeypatch), load(toy_file(tmp_path, UMT5), family, monkeypatch)
    for text in (*ODD_TEXTS, *random_texts(50)):
        assert loaded.tokenize(text) == expected.tokenize(text)
    for text in ODD_TEXTS:
        assert_equal_conditioning(conditioning(loaded, text), conditioning(expected, text))


@pytest.mark.parametrize(
    "model",
    [
        changed(),
        changed(charsmap=b""),
        changed(add_dummy_prefix=0),
        changed(remove_extra_whitespaces=0, charsmap=b""),
    ],
    ids=["as it is", "no character map", "no prefix", "all spaces"],
)
def test_the_rules_of_the_tokenizer_survive(model: bytes, tmp_path: Path) -> None:
    # More rows in the embedding than pieces, as UMT5 has them.
    larger = UMT5.model_copy(update={"vocab_size": 4200})
    path = write_gguf(tmp_path / "umt5.gguf", random_state(larger), "Q8_0", model)
    rebuilt = read_checkpoint(path).tokenizer
    original = SentencePieceTokenizer(model)
    assert rebuilt.vocab_size == original.vocab_size == 4096
    assert (rebuilt.eos_token_id, rebuilt.pad_token_id) == (original.eos_token_id, original.pad_token_id)
    assert SentencePieceModel.parse(rebuilt.serialized()[1]) == SentencePieceModel.parse(model)
    for text in (*ODD_TEXTS, *random_texts(50)):
        ids = original.encode(text)
        assert rebuilt.encode(text) == ids and rebuilt.decode(ids) == original.decode(ids)


def test_headers_are_read_as_the_package_reads_them(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(path := tmp_path / "facts.gguf", "t5encoder")
    add_tokenizer(writer, SentencePieceModel.parse(spiece_model()), rows=4200)
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "uint64", "int64", "float64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 7)
    writer.add_custom_alignment(64)
    write_tensors(writer, random_state(V1_1), "Q8_0")
    reader, header = gguf.GGUFReader(path), read_header(path)
    facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert facts.keys() == header.metadata.keys()
    for name, fact in facts.items():
        found = header.metadata[name]
        if isinstance(fact, list):
            found = [value.decode() if isinstance(value, bytes) else value for value in found]
        assert found == fact, name
    assert len(header.tensors) == len(reader.tensors) > 0
    for tensor in reader.tensors:
        stored = header.tensors[tensor.name]
        assert stored.shape == tuple(tensor.shape)[::-1] and stored.start == tensor.data_offset
        assert stored.kind == tensor.tensor_type


def test_blocks_of_an_unknown_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "t5.gguf", random_state(V1_1), "F16")
    content = bytearray(path.read_bytes())
    # Behind a tensor's name come the number of dimensions, two sizes, and the kind.
    place = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    for kind, message in (
        (200, "does not know .*; update it"),
        (25, "keeps shared.weight as I16, which .* cannot unpack"),
    ):
        content[place : place + 4] = kind.to_bytes(4, "little")
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load(path, "mochi", monkeypatch)


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
