"""Batches of samples of about one length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice

import numpy as np
import torch
from torch.utils.data import Sampler

from nai_t5_core.datasets.reading import EmbeddingDataset
from nai_t5_core.facts.given_numbers import whole_number


class LengthSampler(Sampler[list[str]]):
    """A ``batch_sampler`` for torch's DataLoader: lists of ids, in another order in each epoch.

    >>> loader = DataLoader(dataset, batch_sampler=LengthSampler(dataset, 32), collate_fn=collate)

    Samples are drawn in random order into groups of ``batches_sorted`` batches, and each group is cut by length; the
    batches of an epoch come in random order. Samples that are not encoded are left out.

    Args:
        batch_size: samples of a batch; the last may have fewer.
        seed: of the order; with the number of the epoch it gives the order.
        rank, world: of a process that trains along with others. Each gets as many batches.

    Raises:
        ValueError: a number that is none, or no such rank.
    """

    def __init__(
        self,
        dataset: EmbeddingDataset,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        batches_sorted: int = 64,
    ) -> None:
        self.batch_size = whole_number("batch_size", batch_size, 1)
        self.world = whole_number("world", world, 1)
        self.rank = whole_number("rank", rank, 0, self.world - 1)
        self.batches_sorted = whole_number("batches_sorted", batches_sorted, 1)
        self.seed = seed
        self.epoch = 0
        self._ids = dataset.ids
        self._lengths = dataset.lengths()
        # Those that are not encoded have -1, those that failed have none.
        self._numbers = np.flatnonzero(self._lengths > 0)

    def set_epoch(self, epoch: int) -> None:
        """Which order comes next; each run through all batches raises it by one."""
        self.epoch = whole_number("epoch", epoch)

    def __len__(self) -> int:
        batches = -(-len(self._numbers) // self.batch_size)
        return -(-batches // self.world)

    def __iter__(self) -> Iterator[list[str]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        drawn = self._numbers[torch.randperm(len(self._numbers), generator=generator).numpy()]
        group = self.batch_size * self.batches_sorted
        batches = [batch for start in range(0, len(drawn), group) for batch in self._cut(drawn[start : start + group])]
        order = torch.randperm(len(batches), generator=generator).tolist()
        # Where they do not go up evenly, the first are given again, so that no process waits for the others.
        for place in islice(cycle(order), self.rank, len(self) * self.world, self.world):
            yield [self._ids[int(number)].as_py() for number in batches[place]]

    def _cut(self, group: np.ndarray) -> Iterator[np.ndarray]:
        by_length = group[np.argsort(self._lengths[group], kind="stable")]
        for start in range(0, len(by_length), self.batch_size):
            yield by_length[start : start + self.batch_size]
