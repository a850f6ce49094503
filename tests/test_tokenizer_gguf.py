"""The tokenizer in the metadata of a GGUF file gives the ids of the one that was converted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import encoder_part, spiece_model
from conftest import TOY_CONFIGS, random_state
from test_tokenizer import CORPUS, DATA, PLAIN, needs_data
from toy_gguf import ODD_TEXTS, add_tokenizer, gguf, random_texts, write_gguf, write_tensors

from nai_t5_core.tokenizer import JsonTokenizer, SentencePieceTokenizer, load_tokenizer, tokenizer_json_to_sentencepiece
from nai_t5_core.tokenizer.sentencepiece_format import (
    ADD_DUMMY_PREFIX,
    CHARSMAP,
    NORMALIZER_SPEC,
    REMOVE_EXTRA_WHITESPACES,
    SentencePieceModel,
    write_field,
)
from nai_t5_core.weights.examine import examine, find_tokenizer
from nai_t5_core.weights.formats import CheckpointError

V1_1 = TOY_CONFIGS["v1.1"]


def alone(path: Path, model: bytes, rows: int = 0) -> Path:
    """A GGUF file with a vocabulary and no weights."""
    writer = gguf.GGUFWriter(path, "t5encoder")
    add_tokenizer(writer, SentencePieceModel.parse(model), rows)
    write_tensors(writer, {}, "F32")
    return path


def changed(**facts: Any) -> bytes:
    """The toy tokenizer's file with other normalisation: of a field that is there twice, the last counts."""
    fields = {"add_dummy_prefix": ADD_DUMMY_PREFIX, "remove_extra_whitespaces": REMOVE_EXTRA_WHITESPACES}
    fields["charsmap"] = CHARSMAP
    return spiece_model() + write_field(
        NORMALIZER_SPEC, b"".join(write_field(fields[name], value) for name, value in facts.items())
    )


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
@pytest.mark.parametrize("found", ["beside weights", "as a tokenizer"])
def test_the_rules_of_the_tokenizer_survive(found: str, model: bytes, tmp_path: Path) -> None:
    # More rows in the embedding than pieces, as UMT5 has them.
    larger = V1_1.model_copy(update={"vocab_size": 4200})
    path = write_gguf(tmp_path / "t5.gguf", encoder_part(random_state(larger)), "Q8_0", model)
    rebuilt = find_tokenizer(examine(path)) if found == "beside weights" else load_tokenizer(path)
    original = SentencePieceTokenizer(model)
    assert rebuilt is not None and rebuilt.vocab_size == original.vocab_size == 4096
    assert (rebuilt.eos_token_id, rebuilt.pad_token_id) == (original.eos_token_id, original.pad_token_id)
    assert SentencePieceModel.parse(rebuilt.serialized()[1]) == SentencePieceModel.parse(model)
    for text in (*ODD_TEXTS, *random_texts(50)):
        ids = original.encode(text)
        assert rebuilt.encode(text) == ids and rebuilt.decode(ids) == original.decode(ids)


@needs_data
@pytest.mark.parametrize("rows", [0, 32128])
def test_the_real_t5(rows: int, tmp_path: Path) -> None:
    content = (DATA / "t5_tokenizer" / "tokenizer.json").read_bytes()
    model = tokenizer_json_to_sentencepiece(content)
    rebuilt, original = load_tokenizer(alone(tmp_path / "t5.gguf", model, rows)), SentencePieceTokenizer(model)
    assert rebuilt.vocab_size == original.vocab_size == 32100
    reference = JsonTokenizer(content)
    for text in (*CORPUS, *PLAIN, *ODD_TEXTS, *random_texts(200)):
        assert rebuilt.encode(text) == original.encode(text)
    for text in (*CORPUS, *PLAIN):
        assert rebuilt.encode(text) == reference.encode(text)


@needs_data
def test_the_real_pile_t5(tmp_path: Path) -> None:
    """A BPE model, of which llama.cpp writes no rules of white space."""
    model = (DATA / "pile_t5_tokenizer" / "tokenizer.model").read_bytes()
    rebuilt, original = load_tokenizer(alone(tmp_path / "t5.gguf", model, 32128)), SentencePieceTokenizer(model)
    assert rebuilt.vocab_size == original.vocab_size
    assert (rebuilt.eos_token_id, rebuilt.pad_token_id) == (original.eos_token_id, original.pad_token_id)
    for text in (*CORPUS, *PLAIN, *ODD_TEXTS, *random_texts(200)):
        assert rebuilt.encode(text) == original.encode(text), text


def test_the_embedded_one(tmp_path: Path) -> None:
    path = alone(tmp_path / "t5.gguf", spiece_model())
    for source in (path, tmp_path):
        for text in (*CORPUS, *PLAIN):
            assert load_tokenizer(source).encode(text) == SentencePieceTokenizer(spiece_model()).encode(text)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def with_facts(path: Path, facts: dict[str, Any]) -> Path:
    """A whole T5 with any metadata in place of its vocabulary."""
    writer = gguf.GGUFWriter(path, "t5encoder")
    for key, value in facts.items():
        add = writer.add_array if isinstance(value, list) else writer.add_string if isinstance(value, str) else None
        if isinstance(value, bytes):
            add = writer.add_array
        (add or writer.add_uint32)(f"tokenizer.ggml.{key}", value)
    write_tensors(writer, encoder_part(random_state(V1_1)), "F32")
    return path


WHOLE: dict[str, Any] = {
    "model": "t5",
    "tokens": ["<pad>", "</s>", "<unk>", "▁a"],
    "scores": [0.0, 0.0, 0.0, -1.0],
    "token_type": [3, 3, 2, 1],
}


def test_a_small_one_is_whole(tmp_path: Path) -> None:
    assert load_tokenizer(with_facts(tmp_path / "t5.gguf", WHOLE)).encode("a a") == [3, 3, 1]


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"model": "gpt2"},
        {"model": "t5"},
        {"model": "t5", "tokens": ["a"], "scores": [0.0]},
    ],
    ids=["nothing", "another kind", "no tokens", "no kinds"],
)
def test_metadata_without_a_tokenizer(facts: dict[str, Any], tmp_path: Path) -> None:
    path = with_facts(tmp_path / "t5.gguf", facts)
    assert find_tokenizer(examine(path)) is None
    with pytest.raises(ValueError, match=r"t5\.gguf' has no tokenizer of a T5 in its metadata: give a tokenizer\.json"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "facts",
    [
        {"tokens": ["<pad>"]},
        {"tokens": [1, 2, 3, 4]},
        {"tokens": "text"},
        {"tokens": 7},
        {"scores": ["a", "b", "c", "d"]},
        {"scores": 3},
        {"token_type": ["a", "b", "c", "d"]},
        {"precompiled_charsmap": 2**31},
        {"precompiled_charsmap": [1.5, 2.5]},
        {"precompiled_charsmap": "text"},
        {"add_space_prefix": "yes"},
        {"remove_extra_whitespaces": ["a"]},
    ],
    ids=str,
)
def test_a_damaged_vocabulary(facts: dict[str, Any], tmp_path: Path) -> None:
    path = with_facts(tmp_path / "t5.gguf", WHOLE | facts)
    message = r"is a damaged GGUF file \(its vocabulary cannot be read: .*\); fetch it again"
    for load in (load_tokenizer, examine):
        with pytest.raises(ValueError, match=message) as caught:
            load(path)
        assert "t5.gguf" in str(caught.value)
    assert isinstance(caught.value, CheckpointError)


@pytest.mark.parametrize("number", [4, 2**31])
def test_tokens_that_are_not_there_are_none(number: int, tmp_path: Path) -> None:
    facts = WHOLE | {"bos_token_id": number, "padding_token_id": number}
    assert load_tokenizer(with_facts(tmp_path / "t5.gguf", facts)).encode("a") == [3, 1]


def test_nothing_but_filling(tmp_path: Path) -> None:
    facts = {"model": "t5", "tokens": ["[PAD0]", "[PAD1]"], "scores": [0.0, 0.0], "token_type": [5, 5]}
    with pytest.raises(ValueError, match="no SentencePiece model"):
        load_tokenizer(with_facts(tmp_path / "t5.gguf", facts))


def test_the_package_that_unpacks_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = alone(tmp_path / "t5.gguf", spiece_model())
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert load_tokenizer(path).vocab_size == 4096
