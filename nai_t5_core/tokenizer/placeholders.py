"""User-defined words in prompts; each becomes ids beyond the vocabulary (textual inversion)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from nai_t5_core.tokenizer.base import Tokenizer


class PlaceholderTokenizer(Tokenizer):
    """A tokenizer with user-defined words, each of which becomes one or more ids.

    A word is found wherever it is written, in upper or lower case, but not inside a longer word. The text between words
    is tokenized piece by piece, as between special tokens.

    Args:
        base: the tokenizer of all other text.
        words: the ids of each word, at least one.

    Raises ValueError where a word is empty, begins or ends with white space, differs from another only by its case, has
    no ids, or is a token that `base` knows.
    """

    kind = "placeholders"

    def __init__(self, base: Tokenizer, words: Mapping[str, Sequence[int]]) -> None:
        for word, ids in words.items():
            _check(word, ids, base)
        if len({word.lower() for word in words}) < len(words):
            raise ValueError(f"two of the words {list(words)} are the same but for their case; rename one")
        self.base = base
        self.words = {word: list(ids) for word, ids in words.items()}
        self.pad_token_id = base.pad_token_id
        self.eos_token_id = base.eos_token_id
        self.unk_token_id = base.unk_token_id
        self.vocab_size = max([base.vocab_size - 1, *(i for ids in words.values() for i in ids)]) + 1
        # One group for each word, longest first: of two words of which one begins the other, the longer is found.
        self._by_length = sorted(words, key=len, reverse=True)
        self._pattern = re.compile("|".join(f"({_alone(word)})" for word in self._by_length), re.IGNORECASE)
        self._names = {ids[0]: word for word, ids in self.words.items()}
        self._own = {i for ids in self.words.values() for i in ids}

    def _parts(self, text: str) -> Iterator[tuple[int, str, str | None]]:
        """(start, text between, None) or (start, "", word)."""
        position = 0
        for match in self._pattern.finditer(text):
            if match.start() > position:
                yield position, text[position : match.start()], None
            assert match.lastindex is not None
            yield match.start(), "", self._by_length[match.lastindex - 1]
            position = match.end()
        if position < len(text):
            yield position, text[position:], None

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for _, part, word in self._parts(text):
            ids += self.base._ids(part) if word is None else self.words[word]
        return ids

    def _begin(self, text: str, index: int) -> int:
        for start, part, word in self._parts(text):
            size = len(self.base._ids(part)) if word is None else len(self.words[word])
            if index < size:
                return start + (self.base._begin(part, index) if word is None else 0)
            index -= size
        return len(text)

    def _with_end(self, ids: list[int]) -> list[int]:
        return self.base._with_end(ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        parts = []
        for is_own, run in groupby(ids, key=self._own.__contains__):
            if is_own:
                parts += [self._names[i] for i in run if i in self._names]
            else:
                parts.append(self.base.decode(list(run), skip_special_tokens).strip())
        return " ".join(part for part in parts if part)

    def serialized(self) -> tuple[str, bytes]:
        raise ValueError(
            f"the words {list(self.words)} belong to vectors outside this tokenizer; save its base instead"
        )


def _check(word: str, ids: Sequence[int], base: Tokenizer) -> None:
    if not isinstance(word, str) or not word or word != word.strip():
        raise ValueError(f"{word!r} can't be a word of prompts: it is empty, or begins or ends with white space")
    if not ids:
        raise ValueError(f"the word {word!r} has no ids")
    if len(base._ids(word)) == 1:
        raise ValueError(f"{word!r} is a token of the tokenizer already; take another word, such as '<my-{word}>'")


def _alone(word: str) -> str:
    """The pattern of a word that is not part of a longer word."""
    before = r"(?<!\w)" if re.match(r"\w", word[0]) else ""
    after = r"(?!\w)" if re.match(r"\w", word[-1]) else ""
    return f"{before}{re.escape(word)}{after}"
