""":class:`EmbeddingDataset`, which reads a set."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nai_t5_core.datasets.arrow import arrow
from nai_t5_core.datasets.folder import SetFolder
from nai_t5_core.datasets.index import read_index
from nai_t5_core.datasets.plan import existing_plan
from nai_t5_core.datasets.prompt_files import read_token_counts
from nai_t5_core.datasets.samples import known_samples
from nai_t5_core.datasets.shard_files import ShardFile
from nai_t5_core.facts.given_numbers import whole_number
from nai_t5_core.facts.nested_text import shown
from nai_t5_core.facts.paths import user_path

Id = str | int
# Shards that stay mapped; the system limits how many mappings a process may have.
_OPEN = 512


class EmbeddingDataset(Dataset[tuple[Tensor, int]]):
    """The embeddings of a caption set by id, read from files that are mapped into memory.

    >>> dataset = EmbeddingDataset("captions-wan")
    >>> states, n = dataset["clip-17"]          # [n, d_model]
    >>> states, mask = dataset.batch(["clip-17", "clip-18"], pad_to=512)

    Ids are text; a number stands for its digits. Where a set was made without ids, they are the numbers of the rows, so
    that torch's own samplers fit. It can be sent to processes, which open the files by themselves, and forked.

    Args:
        folder: that ``nai-t5 precompute`` wrote.
        dtype: of what is read; sets in 8 bits are kept with scales.

    Attributes:
        ids: of all samples, sorted as text: a pyarrow array.
        plan: what the set was made by.

    Raises:
        ValueError: there is no set, or a file of it is damaged.
        MissingPackageError: pyarrow is not installed.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.folder = SetFolder(user_path(folder))
        self.dtype = dtype
        self.plan = existing_plan(self.folder)
        file = self.folder.samples(self.plan.edition)
        samples = arrow("parquet").read_table(file, columns=["id", "key"]).combine_chunks()
        index = read_index(self.folder)
        places = arrow("compute").index_in(samples["key"], value_set=index["key"])
        found = places.fill_null(-1).to_numpy()
        self.ids = samples["id"].combine_chunks() if hasattr(samples["id"], "combine_chunks") else samples["id"]
        self._shard, self._place, self._rows, self._tokens = (
            np.where(found < 0, -1, index[name].to_numpy()[found] if len(index) else -1)
            for name in ("shard", "place", "rows", "tokens")
        )
        self._open = lru_cache(_OPEN)(lambda number: ShardFile(self.folder.shard(number)))

    def __reduce__(self) -> tuple[Any, ...]:
        return EmbeddingDataset, (self.folder.path, self.dtype)

    def __len__(self) -> int:
        """Samples of the set, those included that are not encoded yet."""
        return len(self.ids)

    def __getitem__(self, sample: Id) -> tuple[Tensor, int]:
        """The states [rows, d_model] of a sample, and how many of the rows a mask counts as text.

        All rows are text, but for families that read the rows of pads as well.

        Raises:
            KeyError: no sample has this id.
            ValueError: it is not encoded yet, or its prompt failed.
        """
        number = self._number(sample)
        shard = self._open(self._shard_of(number))
        return shard.rows(int(self._place[number]), self.dtype), int(self._tokens[number])

    def batch(
        self, samples: Sequence[Id], pad_to: int | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Samples as one tensor.

        Args:
            samples: their ids.
            pad_to: length of the result; by default that of the longest.
            dtype: of the states; by default the data set's.

        Returns:
            States [batch, length, d_model], zeros behind each sample's rows, and a mask [batch, length] bool.

        Raises:
            KeyError, ValueError: as for one sample; there are none; ``pad_to`` is less than the longest has rows.
        """
        return collate([self[sample] for sample in samples], pad_to, dtype)

    def token_count(self, sample: Id) -> int:
        """The tokens of a sample's text with the end token, without the pads that some families count as text.

        Raises:
            KeyError: no sample has this id.
            ValueError: it is not encoded yet.
        """
        number = self._number(sample)
        return int(self._token_counts[self._shard_of(number)][int(self._place[number])])

    @cached_property
    def _token_counts(self) -> list[Tensor]:
        return [read_token_counts(self.folder, number) for number in range(len(self.plan.shards))]

    def id_of_caption(self, caption: str) -> str:
        """An id of a caption, as it was given: for trainers that ask by captions.

        Raises:
            ValueError: the set has no such caption.
        """
        name = self._ids_by_caption.get(caption)
        if name is None:
            raise ValueError(
                f"{self.folder.path} has no caption {shown(caption)}. Captions are found by their whole text: add it "
                "to the set with nai-t5 precompute, and let the trainer leave captions as they are (no tags that are "
                "shuffled or dropped, no words before or after them)"
            )
        return name

    @cached_property
    def _ids_by_caption(self) -> dict[str, str]:
        samples = known_samples(self.folder.samples(self.plan.edition))
        return {caption: name for batch in samples for name, _, caption in batch}

    def lengths(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Rows of each sample, in the order of ``ids``; -1 where it is not encoded yet."""
        return self._rows.astype(np.int32)

    def _shard_of(self, number: int) -> int:
        shard = int(self._shard[number])
        if shard < 0:
            raise ValueError(
                f"{self.ids[number].as_py()!r} is not encoded yet; run nai-t5 precompute again, which goes on where it "
                "ended"
            )
        return shard

    def _number(self, sample: Id) -> int:
        if isinstance(sample, bool) or not isinstance(sample, (str, int, np.integer)):
            raise KeyError(f"{shown(sample)} is no id; ids are text or whole numbers")
        text = str(sample)
        number = bisect_left(self.ids, text, key=lambda one: one.as_py())
        if number == len(self.ids) or self.ids[number].as_py() != text:
            raise KeyError(f"no sample of {self.folder.path} has the id {sample!r}")
        return number


def collate(
    samples: Sequence[tuple[Tensor, int]], pad_to: int | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """As :meth:`EmbeddingDataset.batch`, of samples that were read: a ``collate_fn`` for torch's DataLoader."""
    if not samples:
        raise ValueError("the batch is empty; give at least one id")
    longest = max(len(states) for states, _ in samples)
    length = longest if pad_to is None else whole_number("pad_to", pad_to)
    if length < longest:
        raise ValueError(f"pad_to={pad_to}, and the longest sample has {longest} rows; give at least as many")
    first = samples[0][0]
    out = torch.zeros(len(samples), length, first.shape[1], dtype=dtype or first.dtype)
    mask = torch.zeros(len(samples), length, dtype=torch.bool)
    for place, (states, text_rows) in enumerate(samples):
        out[place, : len(states)] = states
        mask[place, :text_rows] = True
    return out, mask
