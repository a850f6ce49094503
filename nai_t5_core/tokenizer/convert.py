"""Conversion of Unigram tokenizer.json files to SentencePiece models, and back."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nai_t5_core.facts.nested_text import parse_object, shown
from nai_t5_core.tokenizer import sentencepiece_format as spm
from nai_t5_core.tokenizer.sentencepiece_format import SentencePieceModel, write_field, write_piece

_SPACE = "▁"
# Ids that a file may leave out; those that are known do without, or with a few.
_MOST_UNUSED = 100_000
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Normalization:
    """How a text is normalised before it is split into pieces, in SentencePiece's terms."""

    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Normalization:
        """What the normalizer and the pre-tokenizer of a parsed tokenizer.json do together.

        Raises ValueError where they hold a step that SentencePiece does not have.
        """
        charsmap, collapse, prefix, escape = b"", False, False, False
        for step in _steps(data.get("normalizer"), "normalizers"):
            if step["type"] == "Precompiled":
                charsmap = base64.b64decode(step["precompiled_charsmap"] or "")
            elif step["type"] == "Strip" or (step["type"] == "Replace" and step["pattern"].get("Regex") == " {2,}"):
                collapse = True
            else:
                raise ValueError(f"SentencePiece has no normalizer {shown(step)}: use the json as it is")
        for step in _steps(data.get("pre_tokenizer"), "pretokenizers"):
            if step["type"] == "WhitespaceSplit":
                collapse = True
            elif step["type"] == "Metaspace" and step.get("replacement", _SPACE) == _SPACE:
                escape = True
                prefix = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
            else:
                raise ValueError(f"SentencePiece has no pre-tokenizer {shown(step)}: use the json as it is")
        return cls(charsmap, prefix, collapse, escape)

    def write(self) -> bytes:
        """As the bytes of a NormalizerSpec message."""
        values: dict[int, str | bytes | int] = {
            spm.NORMALIZER_NAME: "precompiled" if self.charsmap else "identity",
            spm.CHARSMAP: self.charsmap,
            spm.ADD_DUMMY_PREFIX: int(self.add_dummy_prefix),
            spm.REMOVE_EXTRA_WHITESPACES: int(self.remove_extra_whitespaces),
            spm.ESCAPE_WHITESPACES: int(self.escape_whitespaces),
        }
        return b"".join(write_field(number, value) for number, value in values.items())


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer entry as a flat list of its steps."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for entry in part[key] for step in _steps(entry, key)]


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json to SentencePiece
# ---------------------------------------------------------------------------------------------------------------------


def tokenizer_json_to_sentencepiece(json_bytes: bytes) -> bytes:
    """A serialized SentencePiece model with the pieces, scores, ids and normalisation of a Unigram tokenizer.json.

    `<extra_id_N>` become user-defined symbols at their ids, other special tokens control symbols, `<0x..>` byte pieces
    where byte_fallback is set. Ids that the json leaves out are filled with unused pieces.

    Raises ValueError where the file is no tokenizer.json, is not Unigram (BPE merges have no scores), has no unknown
    token or end token, or has a normalizer or pre-tokenizer that SentencePiece does not have.
    """
    data = _read_json(json_bytes)
    try:
        return _as_sentencepiece(data)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"this tokenizer.json is damaged ({error!r}); fetch it again") from error


def _as_sentencepiece(data: Mapping[str, Any]) -> bytes:
    """Raises errors of several types where something else stands in the place of a token, a score or a step."""
    model = data["model"]
    added = {token["id"]: token for token in data.get("added_tokens") or []}
    vocabulary = {i: (text, float(score)) for i, (text, score) in enumerate(model["vocab"])}
    for i, token in added.items():
        vocabulary.setdefault(i, (token["content"], 0.0))
    ids = {text: i for i, (text, _) in vocabulary.items()}
    if model.get("unk_id") is None or "</s>" not in ids:
        raise ValueError("this tokenizer.json has no unknown token or no end token '</s>': it is no T5 tokenizer")

    size = max(vocabulary) + 1
    if size > len(vocabulary) + _MOST_UNUSED:
        raise ValueError(f"this tokenizer.json has {len(vocabulary):,} tokens and the id {size - 1:,}: it is damaged")
    unused_score = min(score for _, score in vocabulary.values())
    out = []
    for i in range(size):
        text, score = vocabulary.get(i, (f"<unused_{i}>", unused_score))
        out.append(write_piece(text, score, _piece_kind(i, text, model, added) if i in vocabulary else spm.UNUSED))
    out.append(write_field(spm.TRAINER_SPEC, _trainer_spec(model, vocabulary, ids)))
    out.append(write_field(spm.NORMALIZER_SPEC, Normalization.from_json(data).write()))
    return b"".join(out)


def _read_json(json_bytes: bytes) -> dict[str, Any]:
    """Parses a Unigram tokenizer.json; raises a ValueError for anything else."""
    try:
        data = parse_object(json_bytes)
    except ValueError as error:
        raise ValueError(f"these {len(json_bytes)} bytes are no json: {error}") from None
    if not isinstance(data.get("model"), dict) or "vocab" not in data["model"]:
        raise ValueError("this json has no 'model' with a 'vocab', so it is no tokenizer.json")
    model = data["model"]
    kind = model.get("type", "Unigram" if isinstance(model["vocab"], list) else "BPE")
    if kind != "Unigram":
        raise ValueError(
            f"a tokenizer.json of type {kind} can't become a SentencePiece model, only Unigram can: "
            "use the tokenizer.json as it is"
        )
    return data


def _piece_kind(i: int, text: str, model: dict[str, Any], added: dict[int, dict[str, Any]]) -> int:
    if i == model["unk_id"]:
        return spm.UNKNOWN
    if spm.EXTRA_ID.fullmatch(text):
        return spm.USER_DEFINED
    if i in added:
        return spm.CONTROL if added[i].get("special") else spm.USER_DEFINED
    if text in ("<pad>", "</s>", "<s>"):
        return spm.CONTROL
    return spm.BYTE if model.get("byte_fallback") and _BYTE_PIECE.fullmatch(text) else spm.NORMAL


def _trainer_spec(model: dict[str, Any], vocabulary: dict[int, tuple[str, float]], ids: dict[str, int]) -> bytes:
    values = {
        spm.MODEL_TYPE: 1,
        spm.VOCAB_SIZE: max(vocabulary) + 1,
        spm.BYTE_FALLBACK: int(bool(model.get("byte_fallback"))),
        spm.UNK_ID: model["unk_id"],
        spm.BOS_ID: ids.get("<s>", -1),
        spm.EOS_ID: ids["</s>"],
        spm.PAD_ID: ids.get("<pad>", -1),
        spm.UNK_PIECE: vocabulary[model["unk_id"]][0],
        spm.BOS_PIECE: "<s>",
        spm.EOS_PIECE: "</s>",
        spm.PAD_PIECE: "<pad>",
    }
    return b"".join(write_field(number, value) for number, value in values.items())


# ---------------------------------------------------------------------------------------------------------------------
# SentencePiece to tokenizer.json
# ---------------------------------------------------------------------------------------------------------------------


def sentencepiece_to_tokenizer_json(model_bytes: bytes) -> bytes:
    """A tokenizer.json (UTF-8) with the pieces, ids and normalisation of a Unigram SentencePiece model.

    Control, unknown and user-defined pieces become added tokens; `<extra_id_N>` that a T5 or UMT5 file leaves out are
    appended in their reverse order (`missing_extra_ids`). The end token is added by the post-processor.

    Raises ValueError where the bytes are no SentencePiece model, or one that is not Unigram, puts whitespace at the end
    of words, or has no unknown or end piece.
    """
    model = SentencePieceModel.parse(model_bytes)
    if model.model_type != "unigram" or model.whitespace_as_suffix:
        what = "whitespace as suffix" if model.whitespace_as_suffix else f"type {model.model_type}"
        raise ValueError(f"a SentencePiece model with {what} can't become a tokenizer.json, only plain unigram can")
    ids = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    unk_id = next((i for i, (_, _, kind) in enumerate(model.pieces) if kind == spm.UNKNOWN), None)
    if unk_id is None or model.eos_piece not in ids:
        raise ValueError(f"this SentencePiece model has no unknown piece or no end piece {model.eos_piece!r}")
    has_extra_ids = any("<extra_id_0>" in text for text in ids)
    missing = spm.missing_extra_ids(len(model.pieces), ids.get(model.pad_piece, -1), has_extra_ids)
    pieces = model.pieces + [(f"<extra_id_{i}>", 0.0, spm.USER_DEFINED) for i in reversed(range(missing))]
    metaspace = {
        "type": "Metaspace",
        "replacement": _SPACE,
        "prepend_scheme": "always" if model.add_dummy_prefix else "never",
        "split": True,
    }
    split = [{"type": "WhitespaceSplit"}] if model.remove_extra_whitespaces else []
    charsmap = base64.b64encode(model.charsmap).decode()
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(pieces),
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap} if charsmap else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, metaspace]},
        "post_processor": _end_token_processor(model.eos_piece, ids[model.eos_piece]),
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, metaspace]}
        if model.byte_fallback
        else metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": unk_id,
            "vocab": [[text, score] for text, score, _ in pieces],
            "byte_fallback": model.byte_fallback,
        },
    }
    return json.dumps(data, ensure_ascii=False).encode()


def _added_tokens(pieces: list[tuple[str, float, int]]) -> list[dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": text, **plain, "special": kind != spm.USER_DEFINED or bool(spm.EXTRA_ID.fullmatch(text))}
        for i, (text, _, kind) in enumerate(pieces)
        if kind in (spm.UNKNOWN, spm.CONTROL, spm.USER_DEFINED)
    ]


def _end_token_processor(token: str, token_id: int) -> dict[str, Any]:
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B"))
    end = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, end],
        "pair": [first, end, second, end],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
