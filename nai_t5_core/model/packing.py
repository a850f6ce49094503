"""Padded batch to packed row and back, and which rows attend to which.

A batch ``[batch, length]`` becomes one packed row of the positions that are computed, prompt after prompt; in it each
prompt is a "document". The encoder computes only that row; attention is restricted to each document's own keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from nai_t5_core.facts.given_numbers import whole_number
from nai_t5_core.facts.padding import LONGEST_ROW, PADDING_POLICIES, PaddingPolicy
from nai_t5_core.model.inputs import moved, moved_together

# Token counts that a compiled encoder computes: a packed row is padded to the next. Each is at most double the last.
TOKEN_BUCKETS = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


def bucket_for(tokens: int, buckets: tuple[int, ...] = TOKEN_BUCKETS) -> int:
    """The smallest bucket that holds a row; beyond the largest bucket, the next multiple of the largest."""
    largest = buckets[-1]
    return next((bucket for bucket in buckets if tokens <= bucket), -(-tokens // largest) * largest)


@dataclass(frozen=True)
class DocumentGroup:
    """Documents of one shape that follow one another in the packed row.

    Each of the ``count`` documents has ``queries`` rows; its keys are its rows ``key_start … key_start + keys``.
    ``keys = 0`` stands for a prompt whose mask is all zero: its rows attend evenly to every row of the document, which
    is what a softmax over equally masked logits gives.

    A prompt with holes in its mask has no contiguous keys: then ``count`` is 1, ``key_rows`` lists the keys' rows
    within the document, and ``positions`` the position of every row in the prompt.
    """

    start: int
    count: int
    queries: int
    key_start: int
    keys: int
    key_rows: Tensor | None = None
    positions: Tensor | None = None

    @property
    def stop(self) -> int:
        return self.start + self.count * self.queries


@dataclass(frozen=True)
class Packing:
    """How one batch is laid out as a packed row.

    ``index`` holds, for every row of the packed row, its place in the flattened batch; None where the packed row is the
    flattened batch itself. ``output_length`` is the length of the unpacked result.
    """

    batch: int
    length: int
    output_length: int
    groups: tuple[DocumentGroup, ...]
    index: Tensor | None

    @property
    def tokens(self) -> int:
        """Rows that are computed."""
        return self.groups[-1].stop if self.groups else 0

    def pack(self, padded: Tensor) -> Tensor:
        """[batch, length, …] to [tokens, …]."""
        flat = padded.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def pack_onto(self, device: torch.device, padded: Tensor) -> tuple[Tensor, Packing]:
        """[batch, length, …] to [tokens, …] on a device, and this packing there; ids and places go in one copy."""
        places = self._places()
        if not places:
            return self.pack(moved(padded, device)), self
        if padded.is_floating_point() or padded.device == device:
            packing = self._with_places(moved_together(places, device))
            return packing.pack(moved(padded, device)), packing
        row, *places = moved_together([self.pack(padded), *places], device)
        return row, self._with_places(places)

    def _places(self) -> list[Tensor]:
        """Every tensor of this packing."""
        tensors = [self.index]
        for group in self.groups:
            tensors += [group.key_rows, group.positions]
        return [tensor for tensor in tensors if tensor is not None]

    def _with_places(self, places: Iterable[Tensor]) -> Packing:
        """With other tensors in the places of its own, in the order of :meth:`_places`."""
        others = iter(places)
        index = None if self.index is None else next(others)
        groups = tuple(
            group if group.key_rows is None else replace(group, key_rows=next(others), positions=next(others))
            for group in self.groups
        )
        return replace(self, index=index, groups=groups)

    def unpack(self, row: Tensor) -> Tensor:
        """[tokens, …] to [batch, output_length, …]; rows that were never computed are zeros."""
        if self.index is None:
            return row.unflatten(0, (self.batch, self.length))
        padded = row.new_zeros(self.batch * self.length, *row.shape[1:])
        padded = padded.index_copy(0, self.index, row).unflatten(0, (self.batch, self.length))
        return padded[:, : self.output_length]


@dataclass(frozen=True)
class _Document:
    """One prompt of the batch: the positions that are computed and those that are attended to."""

    prompt: int
    queries: Tensor
    keys: Tensor

    @property
    def is_contiguous(self) -> bool:
        """Queries and keys are consecutive positions, so that their distances are distances in the packed row."""
        return _is_run(self.queries) and _is_run(self.keys)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(queries, first key relative to the first query, keys)."""
        first_key = int(self.keys[0] - self.queries[0]) if len(self.keys) else 0
        return len(self.queries), first_key, len(self.keys)


def _is_run(positions: Tensor) -> bool:
    return len(positions) == 0 or int(positions[-1] - positions[0]) + 1 == len(positions)


def check_policy(padding: PaddingPolicy, extra_pad: int) -> None:
    """Raises a ValueError for an unknown policy, or a number of pad positions that is none, negative or too large."""
    if padding not in PADDING_POLICIES:
        raise ValueError(f"unknown padding policy {padding!r}; allowed: {', '.join(PADDING_POLICIES)}")
    whole_number("extra_pad", extra_pad, 0, LONGEST_ROW)


def pack_batch(
    mask: Tensor | None,
    batch: int,
    length: int,
    padding: PaddingPolicy = "exact",
    extra_pad: int = 0,
) -> Packing:
    """Decides which positions of a padded batch are computed, and in which order.

    Args:
        mask: [batch, length] bool, True at real tokens; None where there are no pad tokens.
        padding: ``attend`` treats pad tokens as real, ``exact`` computes pad rows but hides their keys, ``skip`` never
            computes a pad row (zeros in the result), ``trim`` is ``skip`` with the result cut to the longest prompt.
        extra_pad: with ``skip`` and ``trim``, that many pad positions after the last real token are computed as well.

    The tensors of the result are on the CPU; :meth:`Packing.pack_onto` takes them to the device that computes.

    Raises:
        ValueError: unknown policy, negative ``extra_pad``, or a mask of another shape.
    """
    check_policy(padding, extra_pad)
    if mask is not None and mask.shape != (batch, length):
        raise ValueError(
            f"the mask has shape {list(mask.shape)}, the tokens have {[batch, length]}; they must be equal"
        )
    if mask is None or padding == "attend":
        group = DocumentGroup(start=0, count=batch, queries=length, key_start=0, keys=length)
        return Packing(batch, length, length, (group,), index=None)

    documents = list(_documents(mask.cpu(), padding, extra_pad))
    if padding == "exact":
        return Packing(batch, length, length, tuple(_groups(documents)), index=None)

    longest = max((int(document.queries[-1]) + 1 for document in documents), default=0)
    # Documents of one length side by side are one attention call.
    documents.sort(key=lambda document: document.shape)
    places = [document.queries + document.prompt * length for document in documents]
    index = torch.cat(places) if places else torch.zeros(0, dtype=torch.long)
    output_length = longest if padding == "trim" else length
    return Packing(batch, length, output_length, tuple(_groups(documents)), index)


def _documents(mask: Tensor, padding: PaddingPolicy, extra_pad: int) -> Iterator[_Document]:
    length = mask.shape[1]
    everything = torch.arange(length)
    for prompt, row in enumerate(mask):
        real = row.nonzero().squeeze(1)
        if padding == "exact":
            yield _Document(prompt, everything, real)
        elif len(real):
            end = int(real[-1]) + 1
            yield _Document(prompt, torch.cat([real, everything[end : end + extra_pad]]), real)


def _groups(documents: list[_Document]) -> Iterator[DocumentGroup]:
    """Joins neighbouring documents of one shape; a document with holes in its mask is a group by itself."""
    start = 0
    for is_contiguous, neighbours in groupby(documents, key=lambda document: document.is_contiguous):
        if not is_contiguous:
            for document in neighbours:
                group = _group_with_holes(document, start)
                yield group
                start = group.stop
            continue
        for (queries, key_start, keys), alike in groupby(neighbours, key=lambda document: document.shape):
            group = DocumentGroup(start, len(list(alike)), queries, key_start, keys)
            yield group
            start = group.stop


def _group_with_holes(document: _Document, start: int) -> DocumentGroup:
    return DocumentGroup(
        start=start,
        count=1,
        queries=len(document.queries),
        key_start=0,
        keys=len(document.keys),
        key_rows=torch.isin(document.queries, document.keys).nonzero().squeeze(1),
        positions=document.queries,
    )
