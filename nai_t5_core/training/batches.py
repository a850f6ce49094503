"""Batches of a training run. Each depends on the seed and its number only: a resumed run asks for the next number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nai_t5_core.facts.nested_text import parse_object
from nai_t5_core.model.t5 import IGNORE_INDEX
from nai_t5_core.tokenizer import Tokenizer
from nai_t5_core.training.config import DataSection
from nai_t5_core.training.span_corruption import Ids, corrupt

Example = tuple[Ids, Ids]
# First numbers of the seeds of orders and of examples, so that the two draw different random numbers.
_ORDER, _EXAMPLE = 0, 1


@dataclass(frozen=True)
class Batch:
    """The inputs of the model: ids and mask [rows, length], labels [rows, text length], −100 behind the end."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def targets(self) -> int:
        """The number of labels that count in the loss."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


class Texts(Protocol):
    """The examples of one file. ``example`` gives inputs and targets, without end tokens."""

    def __len__(self) -> int: ...

    def example(self, index: int, random: np.random.Generator) -> Example: ...


class SpanCorruption:
    """Texts with spans taken out, drawn anew each time; see :mod:`nai_t5_core.training.span_corruption`."""

    def __init__(self, texts: Sequence[Ids], sentinels: Ids, section: DataSection) -> None:
        self.texts, self.sentinels, self.section = texts, sentinels, section

    def __len__(self) -> int:
        return len(self.texts)

    def example(self, index: int, random: np.random.Generator) -> Example:
        section = self.section
        return corrupt(self.texts[index], self.sentinels, section.noise_density, section.mean_span, random)


class Prefixes:
    """Texts cut at a random place, drawn anew each time: the first part is the input, the second the target."""

    def __init__(self, texts: Sequence[Ids]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def example(self, index: int, random: np.random.Generator) -> Example:
        text = self.texts[index]
        cut = int(random.integers(1, len(text)))
        return text[:cut], text[cut:]


class Pairs:
    """Questions with their answers."""

    def __init__(self, pairs: Sequence[Example]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def example(self, index: int, random: np.random.Generator) -> Example:
        return self.pairs[index]


class Batches:
    """``batches(number)`` is always the same batch. Every file is read in a new random order in each epoch.

    Args:
        sections: the files; each contributes its ``rows`` to every batch.
        tokenizer: the model's.
        seed: of the orders and of the noise.
        rank, count: with several processes, this one gets the rows ``rank``, ``rank + count`` … of every batch.

    Raises:
        ValueError: a file that cannot be read, is empty, or holds something else; no sentinels in the vocabulary; more
            processes than rows.
    """

    def __init__(
        self, sections: Sequence[DataSection], tokenizer: Tokenizer, seed: int, rank: int = 0, count: int = 1
    ) -> None:
        rows = [(place, row) for place, section in enumerate(sections) for row in range(section.rows)]
        if len(rows) < count:
            raise ValueError(f"{count} processes for batches of {len(rows)} rows; give each process a row at least")
        self.rows = rows[rank::count]
        self.sections, self.seed = sections, seed
        self.end, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.sources = [read_texts(section, tokenizer) for section in sections]
        self._orders: dict[int, tuple[int, Ids]] = {}

    def __call__(self, number: int) -> Batch:
        examples = [self._example(place, number * self.sections[place].rows + row) for place, row in self.rows]
        inputs, targets = ([np.append(example[part], self.end) for example in examples] for part in (0, 1))
        ids = _padded(inputs, self.pad)
        lengths = torch.tensor([len(row) for row in inputs])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return Batch(ids, mask.long(), _padded(targets, IGNORE_INDEX))

    def _example(self, place: int, position: int) -> Example:
        """The example at a position in the endless stream of a file's epochs."""
        source = self.sources[place]
        epoch, index = divmod(position, len(source))
        random = np.random.default_rng([_EXAMPLE, self.seed, place, position])
        return source.example(int(self._order(place, epoch)[index]), random)

    def _order(self, place: int, epoch: int) -> Ids:
        known = self._orders.get(place)
        if known is None or known[0] != epoch:
            random = np.random.default_rng([_ORDER, self.seed, place, epoch])
            known = self._orders[place] = (epoch, random.permutation(len(self.sources[place])))
        return known[1]


def _padded(rows: Sequence[Ids], fill: int) -> Tensor:
    out = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(out)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def read_texts(section: DataSection, tokenizer: Tokenizer) -> Texts:
    """The examples of one file, tokenized.

    Raises:
        ValueError: see :class:`Batches`.
    """
    if section.objective == "pairs":
        return Pairs(list(_read_pairs(section, tokenizer)))
    texts = list(_read_lines(section, tokenizer))
    if section.objective == "prefix":
        return Prefixes(texts)
    return SpanCorruption(texts, sentinel_ids(tokenizer), section)


def sentinel_ids(tokenizer: Tokenizer) -> Ids:
    """The ids of ``<extra_id_0>``, ``<extra_id_1>`` and so on, as many as the vocabulary has.

    Raises:
        ValueError: there are none.
    """
    found: list[int] = []
    while len(ids := tokenizer.encode(f"<extra_id_{len(found)}>", add_eos=False)) == 1:
        found += ids
    if not found:
        raise ValueError("the vocabulary has no sentinels (<extra_id_0> …), which span corruption needs; use 'prefix'")
    return np.array(found, dtype=np.int64)


def _read_lines(section: DataSection, tokenizer: Tokenizer) -> Iterator[Ids]:
    """Texts in pieces of at most ``max_length`` tokens, end token included. A last piece of one token is dropped."""
    piece = section.max_length - 1
    for number, line in _lines(section.file):
        ids = np.array(tokenizer.encode(line, add_eos=False), dtype=np.int64)
        if len(ids) < 2:
            raise ValueError(f"{section.file}, line {number}: {line!r} is a single token; {section.objective} needs 2")
        pieces = (ids[start : start + piece] for start in range(0, len(ids), piece))
        yield from (part for part in pieces if len(part) > 1)


def _read_pairs(section: DataSection, tokenizer: Tokenizer) -> Iterator[Example]:
    for number, line in _lines(section.file):
        try:
            pair = parse_object(line)
            texts = (pair["input"], pair["target"])
            question, answer = (np.array(tokenizer.encode(text, add_eos=False), dtype=np.int64) for text in texts)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{section.file}, line {number}: no object {{"input": "…", "target": "…"}} ({error!r})'
            ) from error
        longest = max(len(question), len(answer)) + 1
        if longest > section.max_length:
            raise ValueError(
                f"{section.file}, line {number}: {longest} tokens, more than max_length={section.max_length}; "
                "raise max_length or shorten the pair"
            )
        yield question, answer


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{file} is empty; it needs a line at least")
    yield from lines
