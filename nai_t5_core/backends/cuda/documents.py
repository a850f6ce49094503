"""The documents of a packed row as a table for the attention kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nai_t5_core.model.packing import DocumentGroup

COLUMNS = 5


def query_block(tokens: int) -> int:
    """Queries that one program of the attention takes: few in short rows, so that all of the device has work."""
    return 16 if tokens <= 128 else 64


def key_block(query_block: int) -> int:
    """Keys that it takes at a time; both are, on an H200, the fastest of rows from 20 to 1300 tokens or next to it."""
    return 64 if query_block == 16 else 32


def has_holes(groups: Sequence[DocumentGroup]) -> bool:
    """Whether a document's keys are no run of its rows, which the table cannot say."""
    return any(group.positions is not None for group in groups)


def document_table(groups: Sequence[DocumentGroup], block: int) -> Tensor:
    """[blocks, 5] int32 on the CPU, one row for every ``block`` queries of a document.

    A row has the document's first row, its rows, the block's first query in it, the first key in it, and the keys;
    no keys stand for attention that is even over all rows of the document.
    """
    rows = [
        (start, group.queries, first, group.key_start, group.keys)
        for group in groups
        for start in range(group.start, group.stop, max(group.queries, 1))
        for first in range(0, group.queries, block)
    ]
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, COLUMNS)
