"""Encoded prompts kept by their token ids, so that what was encoded together can be asked for one by one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class RowMemory:
    """Rows of encoder output, each under the ids and the mask that it was computed from."""

    def __init__(self, rows: dict[tuple[bytes, bytes], Tensor] | None = None) -> None:
        self._rows = rows or {}
        self.missed = False
        """Whether a batch was asked for that is not all here."""

    def add(self, input_ids: Tensor, attention_mask: Tensor | None, hidden: Tensor) -> None:
        """Keeps a batch: ids and mask [batch, length], hidden states [batch, length, d_model]."""
        self._rows.update(zip(_keys(input_ids, attention_mask), hidden, strict=True))

    def add_each_alone(self, input_ids: Tensor, attention_mask: Tensor, hidden: Tensor) -> None:
        """The same, each prompt without its pads."""
        for ids, real, rows in zip(input_ids, attention_mask != 0, hidden, strict=True):
            self.add(ids[real][None], None, rows[real][None])

    def copy(self) -> RowMemory:
        """Another with the same rows, to which others may be added."""
        return RowMemory(dict(self._rows))

    def find(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """A new [batch, length, d_model], or None if a row is missing."""
        is_plain = attention_mask is None or attention_mask.ndim == 2
        rows = [self._rows.get(key) for key in _keys(input_ids, attention_mask)] if is_plain else []
        found = [row for row in rows if row is not None]
        if found and len(found) == len(rows):
            return torch.stack(found)
        self.missed = True
        return None

    def __len__(self) -> int:
        return len(self._rows)


def _keys(input_ids: Tensor, attention_mask: Tensor | None) -> Iterator[tuple[bytes, bytes]]:
    """What tells prompts apart: the ids, and which of them are real. No mask means that all are."""
    ids = input_ids.detach().to("cpu", torch.int64)
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.detach().cpu() != 0
    for row, shown in zip(ids, real, strict=True):
        yield row.numpy().tobytes(), shown.numpy().tobytes()
