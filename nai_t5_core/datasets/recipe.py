"""What the embeddings of a set have in common: the encoder, what is fed to it, and how the results are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Literal, get_args

from nai_t5_core.facts.families import family as family_named
from nai_t5_core.facts.given_numbers import whole_number
from nai_t5_core.facts.nested_text import shown
from nai_t5_core.facts.padding import LONGEST_ROW, PADDING_POLICIES, PaddingPolicy
from nai_t5_core.facts.text_cleaning import TextCleaning, repairs_unicode

Store = Literal["bfloat16", "int8", "float8"]
Compression = Literal["none", "zlib", "zstd"]


@dataclass(frozen=True)
class Feeding:
    """How a caption becomes the ids that are fed, and which rows of the result are kept.

    Attributes:
        family: the diffusion model's name; None where only a length is given.
        cleaning: of the text.
        max_length: tokens that a prompt is cut to, its end token included.
        padding: which pads are computed, see :func:`nai_t5_core.model.packing.pack_batch`.
        extra_pad: pads after the text that are computed and counted as text.
        to_max_length: whether ``attend`` and ``exact`` fill prompts up to ``max_length``; else they add no pads.
        ftfy: whether cleaning has it. Without it, broken Unicode is left as it is, and other prompts come of the same
            captions. None where cleaning does not use it.
    """

    family: str | None
    cleaning: TextCleaning
    max_length: int
    padding: PaddingPolicy
    extra_pad: int
    to_max_length: bool
    ftfy: bool | None = None

    @classmethod
    def choose(
        cls, family: str | None = None, max_length: int | None = None, padding: PaddingPolicy | None = None
    ) -> Feeding:
        """A family's, with another length or policy where one is given.

        Raises:
            ValueError: an unknown family or policy, neither a family nor a length, or a length beyond what is allowed.
        """
        if padding is not None and padding not in PADDING_POLICIES:
            raise ValueError(f"unknown padding policy {shown(padding)}; allowed: {', '.join(PADDING_POLICIES)}")
        if max_length is not None:
            max_length = whole_number("max_length", max_length, 1, LONGEST_ROW)
        if family is None:
            if max_length is None:
                raise ValueError("give a family such as wan, or max_length: the tokens that a caption is cut to")
            return cls(None, "none", max_length, padding or "trim", 0, False)
        row = family_named(family)
        if max_length is not None and row.length_limit is not None and max_length > row.length_limit:
            raise ValueError(f"max_length={max_length}; {row.title} takes at most {row.length_limit} tokens")
        return cls(
            family=row.name,
            cleaning=row.text_cleaning,
            max_length=max_length or row.call_length or row.max_length,
            padding=padding or row.padding,
            extra_pad=row.extra_pad,
            to_max_length=row.pad_to == "max_length",
            ftfy=find_spec("ftfy") is not None if repairs_unicode(row.text_cleaning) else None,
        )

    def fed(self, ids: list[int], pad: int) -> list[int]:
        """All ids that are attended to, for the ids of a prompt with its end token."""
        if self.padding == "attend" and self.to_max_length:
            return ids + [pad] * (self.max_length - len(ids))
        return ids

    def text_rows(self, tokens: int) -> int:
        """Rows of a prompt that a mask counts as text."""
        return min(tokens + self.extra_pad, self.max_length)

    def kept_rows(self, tokens: int) -> int:
        """Rows of a prompt that are kept: all that can differ from zero and be read."""
        fills = self.padding in ("attend", "exact") and self.to_max_length
        return self.max_length if fills else self.text_rows(tokens)


@dataclass(frozen=True)
class Keeping:
    """How results are written: the dtype of the numbers, whether they are compressed, and bytes of a shard."""

    store: Store = "bfloat16"
    compress: Compression = "none"
    shard_bytes: int = 512_000_000

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("store", self.store, get_args(Store)),
            ("compress", self.compress, get_args(Compression)),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={shown(value)}; allowed: {', '.join(allowed)}")
        whole_number("shard_bytes", self.shard_bytes, 1)

    @property
    def bytes_per_number(self) -> int:
        return 2 if self.store == "bfloat16" else 1


@dataclass(frozen=True)
class Recipe:
    """All that has to be the same in every run that adds to a set.

    Attributes:
        encoder: what the key of a prompt says beside its ids, see :class:`nai_t5_core.prompts.cache.key.Settings`.
        tokenizer: the hash of its contents.
        pad: the id of its pad token.
        d_model: numbers of a row.
    """

    encoder: Mapping[str, Any]
    tokenizer: str
    pad: int
    d_model: int
    feeding: Feeding
    keeping: Keeping = field(default_factory=Keeping)

    @cached_property
    def row_bytes(self) -> int:
        """Of a row as it is stored, before compression."""
        return self.d_model * self.keeping.bytes_per_number

    def as_dict(self) -> dict[str, Any]:
        """As plan.json has it."""
        return {
            "encoder": dict(self.encoder),
            "tokenizer": self.tokenizer,
            "pad": self.pad,
            "d_model": self.d_model,
            "feeding": asdict(self.feeding),
            "keeping": asdict(self.keeping),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        return cls(
            values["encoder"],
            values["tokenizer"],
            values["pad"],
            values["d_model"],
            Feeding(**values["feeding"]),
            Keeping(**values["keeping"]),
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], under: str = "") -> list[str]:
    """What differs between two recipes as dictionaries: ``"max_length is 512 there and 226 now"``."""
    found: list[str] = []
    for name in sorted({*before, *now}):
        one, other = before.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{under}{name}.")
        elif one != other:
            found.append(f"{under}{name} is {shown(one)} there and {shown(other)} now")
    return found


def common_of_keys(key_text: str) -> dict[str, Any]:
    """What a key's text says beside the ids."""
    return {name: value for name, value in json.loads(key_text).items() if name not in ("ids", "vectors")}


def tokenizer_contents(kind: str, content: bytes) -> str:
    return hashlib.sha256(kind.encode() + b"\n" + content).hexdigest()
