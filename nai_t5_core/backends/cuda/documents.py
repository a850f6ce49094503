"""The documents of a packed row as a table for the attention kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nai_t5_core.model.packing import DocumentGroup

COLUMNS = 5


def has_holes(groups: Sequence[DocumentGroup]) -> bool:
    """Whether a document's keys are not consecutive rows, which the table cannot describe."""
    return any(group.positions is not None for group in groups)


def document_table(groups: Sequence[DocumentGroup], block: int) -> Tensor:
    """[blocks, 5] int32 on the CPU, one row for every ``block`` queries of a document.

    A row of the table has: the document's first row in the packed row, its number of rows, the block's first query and
    the first key within the document, and the number of keys; 0 keys mean even attention to all rows of the document.
    """
    rows = [
        (start, group.queries, first, group.key_start, group.keys)
        for group in groups
        for start in range(group.start, group.stop, max(group.queries, 1))
        for first in range(0, group.queries, block)
    ]
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, COLUMNS)
