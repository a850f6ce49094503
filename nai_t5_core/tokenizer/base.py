"""The base class of the tokenizers, which checks, truncates and pads a batch of prompts."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nai_t5_core.facts.given_numbers import whole_number
from nai_t5_core.facts.padding import LONGEST_ROW

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of a list of prompts, one entry for each prompt."""

    input_ids: list[list[int]]
    """[batch, length] if padded, rows of their own lengths otherwise."""
    attention_mask: list[list[int]]
    """1 for a token (the end token too), 0 for padding; same shape as `input_ids`."""
    token_counts: list[int]
    """Tokens of each prompt with its end token, after truncation."""
    full_counts: list[int]
    """Tokens of each prompt with its end token, before truncation."""
    truncated: list[bool]
    """Whether something was cut off."""
    cut_text: list[str]
    """The end of the prompt that was cut off, as written; "" where nothing was."""


class Tokenizer(ABC):
    """Text to ids and back. Subclasses split a text into tokens; end token, truncation and padding are done here.

    Lone surrogates are read as U+FFFD. The empty prompt becomes the end token alone.
    """

    kind: str
    pad_token_id: int
    eos_token_id: int
    unk_token_id: int | None
    vocab_size: int

    @abstractmethod
    def _ids(self, text: str) -> list[int]:
        """The ids of a text, without an end token."""

    @abstractmethod
    def _begin(self, text: str, index: int) -> int:
        """The position in `text` where its token number `index` begins."""

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids; ids outside the vocabulary are left out."""

    @abstractmethod
    def serialized(self) -> tuple[str, bytes]:
        """Kind and content, from which :func:`tokenizer_from_bytes` makes the same tokenizer again."""

    def encode(self, text: str, add_eos: bool = True) -> list[int]:
        """The ids of one prompt, untruncated, with the end token unless told otherwise."""
        ids = self._ids(_clean(text, "the prompt"))
        return self._with_end(ids) if add_eos else ids

    def count(self, text: str) -> int:
        """Number of tokens of one prompt, with the end token, untruncated."""
        return len(self.encode(text))

    def __call__(
        self,
        prompts: Sequence[str],
        max_length: int | None = None,
        pad_to: int | Literal["longest"] | None = "longest",
    ) -> TokenBatch:
        """Tokenize, truncate and pad (on the right) a list of prompts.

        A prompt of more than `max_length` tokens keeps its first `max_length - 1` and gets the end token. Rows are
        padded to `pad_to` tokens, to the longest row, or not at all (None).

        Raises ValueError for an empty list, a single string, a prompt that is no string, a `max_length` that is no
        whole number from 1 on, and a `pad_to` that is none, too short for the longest row, or longer than any row that
        is computed (`LONGEST_ROW`).
        """
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
            raise ValueError(
                f"prompts is a {type(prompts).__name__} ({str(prompts)[:40]!r}), not a list: put a single prompt in []"
            )
        if not prompts:
            raise ValueError("the list of prompts is empty: give at least one prompt, which may be ''")
        if max_length is not None and whole_number("max_length", max_length) == 0:
            raise ValueError(f"max_length={max_length} leaves no room for the end token: it must be at least 1")
        texts = [_clean(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
        rows, full_counts, cut_text = [], [], []
        for prompt, text in zip(prompts, texts, strict=True):
            ids = self._ids(text)
            row = self._with_end(ids)
            full_counts.append(len(row))
            if max_length is None or len(row) <= max_length:
                cut_text.append("")
            else:
                cut = prompt[self._begin(text, max_length - 1) :]
                cut_text.append(cut.lstrip() or cut)
                row = self._with_end(ids[: max_length - 1])
            rows.append(row)
        counts = [len(row) for row in rows]
        widths = _padded_lengths(counts, pad_to)
        return TokenBatch(
            input_ids=[row + [self.pad_token_id] * (width - len(row)) for row, width in zip(rows, widths, strict=True)],
            attention_mask=[[1] * count + [0] * (width - count) for count, width in zip(counts, widths, strict=True)],
            token_counts=counts,
            full_counts=full_counts,
            truncated=[full > count for full, count in zip(full_counts, counts, strict=True)],
            cut_text=cut_text,
        )

    def _with_end(self, ids: list[int]) -> list[int]:
        return [*ids, self.eos_token_id]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(vocab_size={self.vocab_size}, pad_token_id={self.pad_token_id}, "
            f"eos_token_id={self.eos_token_id}, unk_token_id={self.unk_token_id})"
        )


def _clean(text: str, name: str) -> str:
    """`text` with every lone surrogate replaced by U+FFFD, so that its length stays; refuses what is no str."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is a {type(text).__name__} ({str(text)[:40]!r}), not a str")
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def _padded_lengths(counts: list[int], pad_to: int | Literal["longest"] | None) -> list[int]:
    """The length of every row after padding."""
    if pad_to is None:
        return counts
    longest = max(counts)
    if pad_to == "longest":
        return [longest] * len(counts)
    if isinstance(pad_to, str):
        raise ValueError(f"pad_to={pad_to!r} is neither a number of tokens nor 'longest' nor None")
    if whole_number("pad_to", pad_to, most=max(longest, LONGEST_ROW)) < longest:
        raise ValueError(
            f"pad_to={pad_to} is less than the {longest} tokens of prompt {counts.index(longest)}: "
            f"pad to at least {longest}, or truncate with max_length={max(pad_to, 1)}"
        )
    return [pad_to] * len(counts)


def split_at_tokens(
    text: str, tokens: re.Pattern[str], ids: Mapping[str, int]
) -> Iterator[tuple[int, str, int | None]]:
    """Splits a text at the special tokens written in it: (start, text between, None) or (start, "", token id)."""
    position = 0
    for match in tokens.finditer(text):
        if match.start() > position:
            yield position, text[position : match.start()], None
        # White space in a match may be part of the token's text, or only be removed with the token.
        found = match.group()
        yield match.start(), "", ids[found if found in ids else found.strip()]
        position = match.end()
    if position < len(text):
        yield position, text[position:], None
