"""Rebuilds the SentencePiece model that a GGUF file was converted from, out of the vocabulary in its metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nai_t5_core.facts.gguf_header import read_header
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
_COLUMNS = ("tokens", "scores", "token_type")
# llama.cpp's names for rows of the embedding that the tokenizer has no piece for.
_FILLING = re.compile(r"\[PAD\d+\]")
# GGUF's names for a Unigram and a BPE model (Pile-T5's), and their numbers in a SentencePiece file.
_MODEL_TYPES = {"t5": 1, "llama": 2}
_SPECIAL = {
    "unknown_token_id": UNK_PIECE,
    "bos_token_id": BOS_PIECE,
    "eos_token_id": EOS_PIECE,
    "padding_token_id": PAD_PIECE,
}


def tokenizer_in_gguf(path: Path) -> bytes:
    """The SentencePiece file of the tokenizer in a GGUF file's metadata; weights are not read.

    Raises ValueError where there is none, or the file is damaged.
    """
    try:
        model = sentencepiece_model(read_header(path).metadata)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} {error}") from error
    if model is None:
        raise ValueError(
            f"{str(path)!r} has no tokenizer of a T5 in its metadata: give a tokenizer.json, a SentencePiece model "
            "(spiece.model), a folder that holds one of them, or a file of weights with one inside"
        )
    return model


def sentencepiece_model(metadata: Mapping[str, Any]) -> bytes | None:
    """A SentencePiece file that gives the same ids as the original; None where the metadata hold no such model.

    Args:
        metadata: of a GGUF file, as :func:`nai_t5_core.facts.gguf_header.read_header` reads them.

    Raises:
        ValueError: values of the vocabulary have wrong types; put the file's name in front of the message.
    """
    facts = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    model = facts.get("model")
    if not isinstance(model, str) or model not in _MODEL_TYPES or not all(key in facts for key in _COLUMNS):
        return None
    try:
        return _model(facts, _MODEL_TYPES[model])
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"is a damaged GGUF file (its vocabulary cannot be read: {error}); fetch it again") from error


def _model(facts: Mapping[str, Any], model_type: int) -> bytes:
    """Raises errors of several types where a fact is of another kind than a vocabulary's."""
    pieces = _pieces(facts)
    ids = {field: facts.get(key, -1) for key, field in _SPECIAL.items()}
    names = {field: pieces[id_][0] for field, id_ in ids.items() if isinstance(id_, int) and 0 <= id_ < len(pieces)}
    pieces = _without_filling(pieces)
    return b"".join(
        [
            *(write_piece(*piece) for piece in pieces),
            write_field(TRAINER_SPEC, _trainer(pieces, names, model_type)),
            write_field(NORMALIZER_SPEC, _normalizer(facts)),
        ]
    )


def _pieces(facts: Mapping[str, Any]) -> list[tuple[str, float, int]]:
    """Text, score and kind of every token; raises errors of several types where the values have wrong types."""
    columns = zip(*(facts[key] for key in _COLUMNS), strict=True)
    return [(token.decode(), float(score), int(kind)) for token, score, kind in columns]


def _without_filling(pieces: list[tuple[str, float, int]]) -> list[tuple[str, float, int]]:
    count = len(pieces)
    while count and pieces[count - 1][2] == UNUSED and _FILLING.fullmatch(pieces[count - 1][0]):
        count -= 1
    return pieces[:count]


def _trainer(pieces: list[tuple[str, float, int]], names: Mapping[int, str], model_type: int) -> bytes:
    has_bytes = any(kind == BYTE for _, _, kind in pieces)
    fields: dict[int, int | str] = {
        MODEL_TYPE: model_type,
        VOCAB_SIZE: len(pieces),
        BYTE_FALLBACK: int(has_bytes),
        **names,
    }
    return b"".join(write_field(number, value) for number, value in sorted(fields.items()))


def _normalizer(facts: Mapping[str, Any]) -> bytes:
    charsmap = np.asarray(facts.get("precompiled_charsmap", np.empty(0, np.uint8)))
    if charsmap.dtype.itemsize != 1:
        raise TypeError(f"precompiled_charsmap holds {charsmap.dtype}, and bytes are needed")
    # llama.cpp's converter does not write this flag for BPE models, which keep white space.
    removes = facts.get("remove_extra_whitespaces", facts["model"] == "t5")
    return (
        write_field(CHARSMAP, charsmap.tobytes())
        + write_field(ADD_DUMMY_PREFIX, int(facts.get("add_space_prefix", True)))
        + write_field(REMOVE_EXTRA_WHITESPACES, int(removes))
    )
