"""Prompts to token ids, behind one call for SentencePiece models, tokenizer.json files and ByT5's bytes.

The reference is the fast tokenizer of transformers 5; docs/tokenizers.md lists where the ids differ from it. Importing
this module loads neither torch nor a tokenizer library: a library is loaded with the first tokenizer that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nai_t5_core.facts.nested_text import parse_object
from nai_t5_core.tokenizer.added_tokens import FolderTokens, read_config
from nai_t5_core.tokenizer.base import TokenBatch, Tokenizer
from nai_t5_core.tokenizer.convert import sentencepiece_to_tokenizer_json, tokenizer_json_to_sentencepiece
from nai_t5_core.tokenizer.inside_weights import TOKENIZER_TENSORS, is_gguf, is_safetensors, tokenizer_inside
from nai_t5_core.tokenizer.kinds import ByteTokenizer, JsonTokenizer, SentencePieceTokenizer
from nai_t5_core.tokenizer.sentencepiece_format import EXTRA_ID

__all__ = [
    "TOKENIZER_TENSORS",
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

# Tokenizer files in a folder of the Hugging Face layout, in transformers' order of preference.
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

    A file is recognised by its content: a tokenizer.json, a SentencePiece model, a ByT5 tokenizer_config.json, or
    weights with a tokenizer inside, in GGUF or in safetensors such as our own converted ones. In a folder,
    tokenizer.json is preferred to a SentencePiece model, as in transformers, and both to weights;
    tokenizer_config.json, added_tokens.json and special_tokens_map.json may add tokens and name the pad token.

    Raises ValueError where there is nothing to read or it is no tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    try:
        if is_safetensors(path) or is_gguf(path):
            return tokenizer_from_bytes(*tokenizer_inside(path))
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"can't read a tokenizer from {str(path)!r}: {error.strerror or error}") from error
    return _recognise(content, path)


def _recognise(content: bytes, path: Path) -> Tokenizer:
    is_json = content.lstrip()[:1] == b"{"
    if is_json and b"ByT5Tokenizer" in content:
        with suppress(ValueError):
            if _is_byte_config(parse_object(content)):
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
    if _is_byte_config(read_config(folder)):
        return _bytes_alone(FolderTokens.read(folder, beside_json=False))
    file = next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    if file is None and len(weights) == 1:
        return load_tokenizer(weights[0])
    if file is None:
        found = sorted(entry.name for entry in folder.iterdir())[:12]
        raise ValueError(
            f"no tokenizer in {str(folder)!r}: it holds {found}, but none of {list(TOKENIZER_FILES)}. "
            "Give the folder that holds one of them (in a diffusers pipeline: tokenizer, tokenizer_2 or tokenizer_3)"
        )
    tokenizer = _recognise(file.read_bytes(), file)
    if isinstance(tokenizer, SentencePieceTokenizer | JsonTokenizer):
        return tokenizer.with_tokens(FolderTokens.read(folder, isinstance(tokenizer, JsonTokenizer)))
    return tokenizer


def _is_byte_config(config: Mapping[str, Any]) -> bool:
    return str(config.get("tokenizer_class", "")).startswith("ByT5Tokenizer")


def _bytes_alone(tokens: FolderTokens) -> ByteTokenizer:
    tokenizer = ByteTokenizer()
    further = [token.content for i, token in tokens.numbered.items() if i >= tokenizer.vocab_size]
    further += [token.content for token in tokens.special if not EXTRA_ID.fullmatch(token.content)]
    if further:
        raise ValueError(
            f"tokens are added to ByT5's ({further[:8]}), which has none but bytes and its extra ids: give a folder "
            "without them, and their rows of the embedding as textual inversions"
        )
    return tokenizer
