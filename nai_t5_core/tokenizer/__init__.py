"""Prompts to token ids, behind one call for SentencePiece models, tokenizer.json files and ByT5's bytes.

The reference is the fast tokenizer of transformers 5; docs/tokenizers.md lists where a file's own rules differ from it.
Importing this module loads neither torch nor a tokenizer library: those load with the first tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nai_t5_core.tokenizer.base import TokenBatch, Tokenizer
from nai_t5_core.tokenizer.convert import sentencepiece_to_tokenizer_json, tokenizer_json_to_sentencepiece
from nai_t5_core.tokenizer.kinds import ByteTokenizer, JsonTokenizer, SentencePieceTokenizer

__all__ = [
    "ByteTokenizer",
    "JsonTokenizer",
    "SentencePieceTokenizer",
    "TokenBatch",
    "Tokenizer",
    "load_tokenizer",
    "sentencepiece_to_tokenizer_json",
    "tokenizer_from_bytes",
    "tokenizer_json_to_sentencepiece",
]

# A tokenizer in a folder of the Hugging Face layout, in the order in which transformers prefers them.
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


def tokenizer_from_bytes(kind: str, content: bytes) -> Tokenizer:
    """The tokenizer whose :meth:`Tokenizer.serialized` gave `kind` and `content`.

    Raises ValueError for an unknown kind and for content that is not of that kind.
    """
    if kind == SentencePieceTokenizer.kind:
        return SentencePieceTokenizer(content)
    if kind == JsonTokenizer.kind:
        return JsonTokenizer(content)
    if kind == ByteTokenizer.kind:
        return ByteTokenizer()
    raise ValueError(f"unknown tokenizer kind {kind!r}: known are 'sentencepiece', 'tokenizer.json' and 'bytes'")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder of the Hugging Face layout, or in a file of any name.

    A file is recognised by its content: a tokenizer.json, a SentencePiece model, or a ByT5 tokenizer_config.json. In a
    folder, tokenizer.json counts before a SentencePiece model, as in transformers, and tokenizer_config.json may add
    tokens and name the pad token.

    Raises ValueError where there is nothing to read or it is no tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"can't read a tokenizer from {str(path)!r}: {error.strerror or error}") from error
    return _recognise(content, path)


def _recognise(content: bytes, path: Path) -> Tokenizer:
    is_json = content.lstrip()[:1] == b"{"
    if is_json and b"ByT5Tokenizer" in content:
        with suppress(ValueError):
            if _is_byte_config(json.loads(content)):
                return ByteTokenizer()
    kind = JsonTokenizer.kind if is_json else SentencePieceTokenizer.kind
    try:
        return tokenizer_from_bytes(kind, content)
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is no T5 tokenizer: {error}. Give a tokenizer.json, a SentencePiece model (spiece.model) "
            "or the folder that holds them"
        ) from None


def _load_folder(folder: Path) -> Tokenizer:
    config = _folder_config(folder)
    if _is_byte_config(config):
        return ByteTokenizer()
    file = next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)
    if file is None:
        found = sorted(entry.name for entry in folder.iterdir())[:12]
        raise ValueError(
            f"no tokenizer in {str(folder)!r}: it holds {found}, but none of {list(TOKENIZER_FILES)}. "
            "Give the folder that holds one of them (in a diffusers pipeline: tokenizer, tokenizer_2 or tokenizer_3)"
        )
    tokenizer = _recognise(file.read_bytes(), file)
    if not isinstance(tokenizer, (SentencePieceTokenizer, JsonTokenizer)):
        return tokenizer
    added = _added_tokens(config, tokenizer)
    pad = _token_text(config.get("pad_token"))
    if pad is not None and tokenizer.token_id(pad) is None and pad not in added:
        added.append(pad)
    if pad is not None and tokenizer.token_id(pad) == tokenizer.pad_token_id:
        pad = None
    return tokenizer.extended(added, pad) if added or pad is not None else tokenizer


def _folder_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                config.update(json.loads((folder / name).read_bytes()))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{str(folder / name)!r} is no json object: {error}") from None
    return config


def _is_byte_config(config: Mapping[str, Any]) -> bool:
    return str(config.get("tokenizer_class", "")).startswith("ByT5Tokenizer")


def _token_text(token: object) -> str | None:
    """A token as the config files write it: a text, or an object with the text inside."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _added_tokens(config: Mapping[str, Any], tokenizer: SentencePieceTokenizer | JsonTokenizer) -> list[str]:
    """The tokens that tokenizer_config.json puts behind those of the tokenizer's file."""
    size = tokenizer.file_size
    listed = {int(i): _token_text(token) or "" for i, token in config.get("added_tokens_decoder", {}).items()}
    new = {i: listed[i] for i in sorted(listed) if i >= size}
    if list(new) != list(range(size, size + len(new))):
        raise ValueError(
            f"tokenizer_config.json adds tokens with the ids {list(new)[:8]}, but the tokenizer's file ends at {size}: "
            "the two files don't belong together"
        )
    if not new and tokenizer.lacks_extra_ids and isinstance(config.get("extra_ids"), int):
        return [f"<extra_id_{i}>" for i in reversed(range(config["extra_ids"]))]
    return list(new.values())
