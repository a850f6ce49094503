"""Tokenizer files that would take a program down or run for ever."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TOY_CONFIGS
from fuzz_readers import readers
from hostile import in_little

from nai_t5_core.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    tokenizer_json_to_sentencepiece,
)
from nai_t5_core.tokenizer.charsmap import refuse_damaged_charsmap
from nai_t5_core.tokenizer.sentencepiece_format import (
    CHARSMAP,
    EOS_PIECE,
    MODEL_TYPE,
    NORMAL,
    NORMALIZER_SPEC,
    PIECE,
    PIECES,
    SCORE,
    TRAINER_SPEC,
    TYPE,
    SentencePieceModel,
    charsmap_of,
    read_fields,
    write_field,
)

V1_1 = TOY_CONFIGS["v1.1"]


def broken_charsmaps(charsmap: bytes) -> dict[str, bytes]:
    size = struct.unpack("<I", charsmap[:4])[0]
    trie, texts = charsmap[4 : 4 + size], charsmap[4 + size :]
    unit = struct.unpack("<I", trie[:4])[0]

    def of(trie: bytes, texts: bytes, declared: int | None = None) -> bytes:
        return struct.pack("<I", len(trie) if declared is None else declared) + trie + texts

    return {
        "random": of(bytes(byte ^ 0x5A for byte in trie), texts),
        "a size beyond its end": of(trie, texts, 2**32 - 1),
        "a size that is no multiple": of(trie, texts, size - 3),
        "no trie": of(b"", texts),
        "no texts": of(trie, b""),
        "cut": charsmap[: len(charsmap) // 2],
        "three bytes": charsmap[:3],
        "a step outside": of(struct.pack("<I", unit | 0x7FFFFC00) + trie[4:], texts),
        "texts that are none": of(trie, b"\xff" * len(texts)),
        "texts without an end": of(trie, texts[:-1]),
    }


def test_charsmaps() -> None:
    """Damage is refused in both kinds of file by the same words, before a library sees it; whole maps are read."""
    spiece, as_json = readers()["spiece.model"].content, json.loads(readers()["tokenizer.json"].content)
    charsmap = charsmap_of(spiece)
    assert len(charsmap) > 1000
    refuse_damaged_charsmap(charsmap)
    for name, broken in broken_charsmaps(charsmap).items():
        with pytest.raises(ValueError, match=r"its map of characters is damaged: .*; fetch the file again"):
            SentencePieceTokenizer(spiece + write_field(NORMALIZER_SPEC, write_field(CHARSMAP, broken)))
        as_json["normalizer"]["precompiled_charsmap"] = base64.b64encode(broken).decode()
        with pytest.raises(ValueError, match=r"its map of characters is damaged: .*; fetch the file again"):
            JsonTokenizer(json.dumps(as_json).encode())
        assert name


@pytest.mark.parametrize(
    "normalizer",
    [{"type": "Precompiled"}, {"type": "Precompiled", "precompiled_charsmap": True}],
    ids=["absent", "of another type"],
)
def test_what_is_a_panic_in_rust_is_an_error_here(normalizer: object) -> None:
    """A PanicException is no Exception; a server ends with it."""
    data = {**json.loads(readers()["tokenizer.json"].content), "normalizer": normalizer}
    with pytest.raises(ValueError, match=r"bytes are no tokenizer.json: .*precompiled_charsmap|expected a borrowed"):
        JsonTokenizer(json.dumps(data).encode())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"unk_id": None}, "no token for what it does not know"),
        ({"unk_id": 10**6}, r"no tokenizer\.json|no token for what"),
        ({"unk_token": "<absent>"}, "no token for what it does not know: .*<absent>"),
    ],
    ids=str,
)
def test_unknown_token_that_is_not_there(model: dict[str, Any], message: str) -> None:
    name = "tokenizer.json, BPE" if "unk_token" in model else "tokenizer.json"
    data = json.loads(readers()[name].content)
    data["model"] |= model
    with pytest.raises(ValueError, match=message):
        JsonTokenizer(json.dumps(data).encode())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"added_tokens_decoder": 7}, "added_tokens_decoder of tokenizer_config.json in .* is 7; an object of tokens"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder of .* is .1.; an object of tokens"),
        ({"added_tokens_decoder": {"9" * 30: "a"}}, "which is no id and no token"),
        ({"added_tokens_decoder": {"1000000000": "a"}}, "which is no id and no token"),
        ({"added_tokens_decoder": {"100000000": "<far>"}}, r"tokens are added with the ids .100000000."),
        ({"additional_special_tokens": 7}, "that the files in .* list are 7; a list of tokens is needed"),
        ({"additional_special_tokens": "<a>"}, "list are '<a>'; a list of tokens is needed"),
        ({"extra_ids": 10**9}, "extra_ids in .* is 1000000000; a number from 0 to 10000 is needed"),
        ({"extra_ids": -1}, "extra_ids in .* is -1; a number"),
        ({"extra_ids": "100"}, "extra_ids in .* is '100'; a number"),
        ([1], "tokenizer_config.json' is no json object: it holds a JSON list, and an object is needed"),
        ([[1, 2]], "is no json object: it holds a JSON list"),
    ],
    ids=str,
)
@pytest.mark.parametrize("beside", ["tokenizer_config.json", "tokenizer_config.json beside a json"])
def test_added_tokens(config: object, message: str, beside: str, tmp_path: Path) -> None:
    readers()[beside].write(tmp_path, json.dumps(config).encode())
    with in_little(), pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_ids_of_added_tokens_that_are_none(tmp_path: Path) -> None:
    for odd in ([], {}, 1.5, None, True, -1):
        readers()["added_tokens.json"].write(tmp_path, json.dumps({"<a>": odd}).encode())
        with pytest.raises(ValueError, match=r"added_tokens.json in .* which is no id and no token"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data["added_tokens"].append({"id": 10**9, "content": "<far>"}),
            "the id 1,000,000,000: it is",
        ),
        (lambda data: data["model"].update(unk_id=10**9), "this tokenizer.json is damaged"),
        (lambda data: data["model"].update(vocab=[["a", "b"]]), "damaged|could not convert"),
        (lambda data: data["model"].update(vocab=7), "damaged"),
        (lambda data: data["model"]["vocab"].append(["a", 1e300]), "damaged"),
        (lambda data: data["model"]["vocab"].append(7), "damaged"),
        (lambda data: data.update(added_tokens=[7]), "damaged"),
        (lambda data: data.update(normalizer={"type": "Sequence"}), "damaged"),
        (lambda data: data.update(normalizer=7), "damaged"),
        (lambda data: data.update(pre_tokenizer=[[]]), "damaged"),
    ],
    ids=range(10),
)
def test_conversion_of_a_damaged_json(change: Callable[[dict[str, Any]], object], message: str) -> None:
    data = json.loads(readers()["tokenizer.json"].content)
    change(data)
    with in_little(), pytest.raises(ValueError, match=message):
        tokenizer_json_to_sentencepiece(json.dumps(data).encode())


def test_white_space_takes_no_longer_than_words() -> None:
    """Once for each place in it, before: a minute for this many."""
    tokenizer = ByteTokenizer()
    with in_little():
        assert tokenizer.count(" " * 100_000) == 100_001
        assert tokenizer([" \n" * 50_000 + "x"], max_length=77).token_counts == [77]
    assert tokenizer.encode("a  <pad> \n</s>b") == [100, 0, 1, 101, 1]


def test_fields_of_another_type_are_passed_over_as_the_library_does() -> None:
    """A number in the place of a text, and a text in that of a number: the last whole value counts."""
    spiece = readers()["spiece.model"].content
    odd = b"".join(
        [
            write_field(NORMALIZER_SPEC, write_field(CHARSMAP, 7)),
            write_field(TRAINER_SPEC, write_field(EOS_PIECE, 7) + write_field(MODEL_TYPE, "bpe")),
            write_field(PIECES, write_field(PIECE, "▁odd") + write_field(SCORE, "much") + write_field(TYPE, "x")),
        ]
    )
    model = SentencePieceModel.parse(spiece + odd)
    before = SentencePieceModel.parse(spiece)
    assert model.pieces[-1][0] == "▁odd" and model.pieces[-1][2] == NORMAL
    assert (model.model_type, model.eos_piece) == (before.model_type, before.eos_piece) == ("unigram", "</s>")
    assert model.charsmap == before.charsmap == charsmap_of(spiece + odd) != b""


def test_numbers_of_more_bytes_than_there_are() -> None:
    with pytest.raises(ValueError, match="the bytes end inside a number, at byte 10"):
        list(read_fields(b"\xff" * 1_000_000))
