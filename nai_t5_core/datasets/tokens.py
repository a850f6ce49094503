"""Captions to prompts: cleaned, tokenized and keyed, in several processes where that is worth starting them.

Imports no torch, so that a process starts in a fraction of a second.
"""

from __future__ import annotations

import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

from nai_t5_core.datasets.interrupts import deaf_to_interrupts, end_with_the_parent
from nai_t5_core.datasets.recipe import Feeding
from nai_t5_core.facts.text_cleaning import clean_text
from nai_t5_core.prompts.cache.key import Settings
from nai_t5_core.tokenizer import Tokenizer, tokenizer_from_bytes

# Batches of captions that are worth a start of processes.
_WORTH_IT = 8
_Tag = TypeVar("_Tag")


@dataclass(frozen=True)
class Prompt:
    """What is fed to the encoder for a caption.

    Attributes:
        key: 32 bytes, the digest of :class:`nai_t5_core.prompts.cache.key.Key`.
        ids: all that is attended to, int32 in this machine's byte order.
        tokens: of the text, with the end token and without pads.
        is_cut: whether the caption was longer than allowed.
    """

    key: bytes
    ids: bytes
    tokens: int
    is_cut: bool


class PromptMaker:
    """Makes prompts of captions, here or in a process that it is sent to."""

    def __init__(self, tokenizer: Tokenizer, feeding: Feeding, settings: Settings) -> None:
        self._serialized = tokenizer.serialized()
        self._tokenizer: Tokenizer | None = tokenizer
        self.feeding = feeding
        self.settings = settings

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tokenizer": None}

    def __call__(self, captions: Sequence[str]) -> list[Prompt]:
        if self._tokenizer is None:
            self._tokenizer = tokenizer_from_bytes(*self._serialized)
        feeding, pad = self.feeding, self._tokenizer.pad_token_id
        cleaned = [clean_text(caption, feeding.cleaning) for caption in captions]
        batch = self._tokenizer(cleaned, feeding.max_length, pad_to=None)
        made = []
        for row, is_cut in zip(batch.input_ids, batch.truncated, strict=True):
            ids = feeding.fed(row, pad)
            key = bytes.fromhex(self.settings.key(ids).digest)
            made.append(Prompt(key, array("i", ids).tobytes(), len(row), is_cut))
        return made


def made_of(
    maker: PromptMaker, batches: Iterable[tuple[_Tag, list[str]]], processes: int | None = None
) -> Iterator[tuple[_Tag, list[Prompt]]]:
    """The prompts of tagged batches of captions, in the order of the batches; few batches are read ahead."""
    remaining = iter(batches)
    first = list(islice(remaining, _WORTH_IT))
    processes = processes or len(_processors())
    if len(first) < _WORTH_IT or processes == 1:
        for tag, captions in _both(first, remaining):
            yield tag, maker(captions)
        return
    with _pool(maker, processes) as pool:
        waiting: deque[tuple[_Tag, Future[list[Prompt]]]] = deque()
        for tag, captions in _both(first, remaining):
            with deaf_to_interrupts():
                # Starts a process where all others are at work.
                future = pool.submit(_make, captions)
            waiting.append((tag, future))
            if len(waiting) > 2 * processes:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())


def _result(tag: _Tag, future: Future[list[Prompt]]) -> tuple[_Tag, list[Prompt]]:
    return tag, future.result()


def _both(
    first: list[tuple[_Tag, list[str]]], rest: Iterator[tuple[_Tag, list[str]]]
) -> Iterator[tuple[_Tag, list[str]]]:
    yield from first
    yield from rest


def _processors() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


@contextmanager
def _pool(maker: PromptMaker, processes: int) -> Iterator[ProcessPoolExecutor]:
    # Not forked: threads of this process, such as torch's, would not be there in a copy of it.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _receive, (maker,))
    try:
        yield pool
    finally:
        # After a fault, batches that nobody waits for are not made.
        pool.shutdown(cancel_futures=True)


_here: PromptMaker | None = None


def _receive(maker: PromptMaker) -> None:
    global _here
    end_with_the_parent()
    _here = maker


def _make(captions: list[str]) -> list[Prompt]:
    assert _here is not None
    return _here(captions)
