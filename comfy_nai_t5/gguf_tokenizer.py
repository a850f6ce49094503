"""The SentencePiece model that a GGUF file was converted from, out of the vocabulary in its metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nai_t5_core.tokenizer.sentencepiece_format import (
    ADD_DUMMY_PREFIX,
    BOS_PIECE,
    BYTE,
    BYTE_FALLBACK,
    CHARSMAP,
    EOS_PIECE,
    MODEL_TYPE,
    NORMALIZER_SPEC,
    PAD_PIECE,
    REMOVE_EXTRA_WHITESPACES,
    TRAINER_SPEC,
    UNK_PIECE,
    UNUSED,
    VOCAB_SIZE,
    write_field,
    write_piece,
)

_PREFIX = "tokenizer.ggml."
# What llama.cpp puts into rows of the embedding for which the tokenizer has no piece.
_FILLING = re.compile(r"\[PAD\d+\]")
# What such files call a Unigram model, and its number in a SentencePiece file.
_UNIGRAM, _UNIGRAM_NUMBER = "t5", 1
_SPECIAL = {
    "unknown_token_id": UNK_PIECE,
    "bos_token_id": BOS_PIECE,
    "eos_token_id": EOS_PIECE,
    "padding_token_id": PAD_PIECE,
}


def sentencepiece_model(metadata: Mapping[str, Any]) -> bytes | None:
    """A SentencePiece file that gives the ids of the one before conversion; None where the metadata hold no such model.

    Args:
        metadata: of a GGUF file, as :func:`comfy_nai_t5.gguf_format.read_header` reads them.
    """
    facts = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    columns = [facts.get(key, ()) for key in ("tokens", "scores", "token_type")]
    lengths = {len(column) for column in columns}
    if facts.get("model") != _UNIGRAM or len(lengths) != 1 or 0 in lengths:
        return None
    pieces = [(token.decode(), float(score), int(kind)) for token, score, kind in zip(*columns, strict=True)]
    ids = {field: facts.get(key, -1) for key, field in _SPECIAL.items()}
    names = {field: pieces[number][0] for field, number in ids.items() if 0 <= number < len(pieces)}
    pieces = _without_filling(pieces)
    return b"".join(
        [
            *(write_piece(*piece) for piece in pieces),
            write_field(TRAINER_SPEC, _trainer(pieces, names)),
            write_field(NORMALIZER_SPEC, _normalizer(facts)),
        ]
    )


def _without_filling(pieces: list[tuple[str, float, int]]) -> list[tuple[str, float, int]]:
    count = len(pieces)
    while pieces[count - 1][2] == UNUSED and _FILLING.fullmatch(pieces[count - 1][0]):
        count -= 1
    return pieces[:count]


def _trainer(pieces: list[tuple[str, float, int]], names: Mapping[int, str]) -> bytes:
    has_bytes = any(kind == BYTE for _, _, kind in pieces)
    fields: dict[int, int | str] = {
        MODEL_TYPE: _UNIGRAM_NUMBER,
        VOCAB_SIZE: len(pieces),
        BYTE_FALLBACK: int(has_bytes),
        **names,
    }
    return b"".join(write_field(number, value) for number, value in sorted(fields.items()))


def _normalizer(facts: Mapping[str, Any]) -> bytes:
    return (
        write_field(CHARSMAP, bytes(facts.get("precompiled_charsmap", b"")))
        + write_field(ADD_DUMMY_PREFIX, int(facts.get("add_space_prefix", True)))
        + write_field(REMOVE_EXTRA_WHITESPACES, int(facts.get("remove_extra_whitespaces", True)))
    )
