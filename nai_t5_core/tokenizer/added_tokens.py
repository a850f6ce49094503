"""Tokens that other files of a folder add to those of the tokenizer file, as transformers 5 reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nai_t5_core.facts.nested_text import parse_object, shown

# Published tokenizers have 100 to 300 of them, and no embedding table has rows for as many as this.
_MOST_EXTRA_IDS = 10_000
_ID_DIGITS = 10


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in a prompt before the prompt is cut into pieces.

    Attributes:
        content: its text.
        special: whether decoding without special tokens leaves it out.
        normalized: whether it is looked for after normalisation.
        lstrip, rstrip: whether white space before, or after, it belongs to the token.
        single_word: whether it is not found within a longer word.
    """

    content: str
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @classmethod
    def read(cls, value: object, special: bool = False) -> AddedToken | None:
        """From an entry of the files: a text, or a JSON object that holds it; None for anything else."""
        values: Mapping[str, Any] = value if isinstance(value, Mapping) else {"content": value}
        content = values.get("content")
        if not isinstance(content, str) or not content or not _is_text(content):
            return None
        special = bool(values.get("special", special))
        flags = {name: bool(values.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
        return cls(content, special, bool(values.get("normalized", not special)), **flags)

    def as_json(self, token_id: int) -> dict[str, Any]:
        """As an entry of a tokenizer.json."""
        return {"id": token_id, **asdict(self)}


@dataclass(frozen=True)
class FolderTokens:
    """The tokens in a folder's files.

    Attributes:
        numbered: tokens by their ids, in the order of the ids.
        special: further special tokens, which get the next ids.
        special_alone: whether only those of a SentencePiece model's extra ids that are in ``special`` are looked for
            in prompts.
        extra_ids: the number of extra ids; None where no file tells it.
        pad_token: the pad token; None where no file names it.
    """

    numbered: Mapping[int, AddedToken] = field(default_factory=dict)
    special: tuple[AddedToken, ...] = ()
    special_alone: bool = False
    extra_ids: int | None = None
    pad_token: str | None = None

    @classmethod
    def read(cls, folder: Path, beside_json: bool) -> FolderTokens:
        """From tokenizer_config.json, special_tokens_map.json and added_tokens.json, those that exist.

        ``beside_json``: whether the tokenizer file is a tokenizer.json, and not a SentencePiece model.

        Raises ValueError where a file is no JSON object, or has something else in a token's place.
        """
        config = _read_object(folder / "tokenizer_config.json")
        settings = {**_read_object(folder / "special_tokens_map.json"), **config}
        # Beside a SentencePiece model, transformers ignores the lists in special_tokens_map.json.
        lists = settings if beside_json else config
        further = lists.get("extra_special_tokens", lists.get("additional_special_tokens", ()))
        if further is not None and not isinstance(further, (Mapping, list, tuple)):
            raise ValueError(
                f"the special tokens that the files in {str(folder)!r} list are {shown(further)}; a list of tokens is "
                "needed"
            )
        listed = further.values() if isinstance(further, Mapping) else further or ()
        pad = AddedToken.read(settings.get("pad_token"))
        return cls(
            numbered=_numbered(folder, config, settings),
            special=tuple(token for value in listed if (token := AddedToken.read(value, special=True))),
            special_alone=bool(listed) and not isinstance(further, Mapping) and not beside_json,
            extra_ids=_extra_ids(folder, settings.get("extra_ids")),
            pad_token=pad.content if pad else None,
        )


def _extra_ids(folder: Path, count: object) -> int | None:
    if count is None or (type(count) is int and 0 <= count <= _MOST_EXTRA_IDS):
        return count
    raise ValueError(f"extra_ids in {str(folder)!r} is {shown(count)}; a number from 0 to {_MOST_EXTRA_IDS} is needed")


def _numbered(folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    if decoder := config.get("added_tokens_decoder"):
        source = "added_tokens_decoder of tokenizer_config.json"
        if not isinstance(decoder, dict):
            raise ValueError(f"{source} in {str(folder)!r} is {shown(decoder)}; an object of tokens by id is needed")
        numbered = list(decoder.items())
    else:
        # The older file; transformers reads it only where added_tokens_decoder is absent.
        source = "added_tokens.json"
        ids = _read_object(folder / source)
        special = {token.content for value in settings.values() if (token := AddedToken.read(value))}
        numbered = [(number, {"content": text, "special": text in special}) for text, number in ids.items()]
    tokens = {}
    for number, value in numbered:
        token = AddedToken.read(value)
        if token is None or not _is_id(number):
            raise ValueError(
                f"{source} in {str(folder)!r} has {shown(number)}: {shown(value)}, which is no id and no token"
            )
        tokens[int(number)] = token
    return dict(sorted(tokens.items()))


def _is_text(content: str) -> bool:
    """Whether it has no lone surrogates, which JSON can write and no token can have."""
    try:
        return bool(content.encode())
    except UnicodeEncodeError:
        return False


def _is_id(number: object) -> bool:
    """Whether it is a number, or a text of one: JSON has only texts for names."""
    return (type(number) is int and number >= 0) or (
        isinstance(number, str) and number.isdecimal() and len(number) < _ID_DIGITS
    )


def refuse_gaps(new: Sequence[int], size: int) -> None:
    """Raises ValueError where the new ids do not follow the last id of the tokenizer file without a gap."""
    if list(new) != list(range(size, size + len(new))):
        raise ValueError(
            f"tokens are added with the ids {list(new)[:8]}, but the tokenizer's file ends at {size}: the files of the "
            "folder don't belong together"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a folder's tokenizer."""
    return _read_object(folder / "tokenizer_config.json")


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return parse_object(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no json object: {error}") from None
