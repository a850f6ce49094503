"""Embeddings in memory, up to so many bytes."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

from torch import Tensor


class MemoryStore:
    """Rows by the name of their key; the least recently used go out.

    What it holds belongs to it alone: rows are copied on the way in and out. Threads may share it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._rows: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = Lock()

    def get(self, name: str, least_rows: int = 1) -> Tensor | None:
        """The rows of an entry, if there are as many."""
        with self._lock:
            rows = self._rows.get(name)
            if rows is None or len(rows) < least_rows:
                return None
            self._rows.move_to_end(name)
        return rows.clone()

    def put(self, name: str, rows: Tensor) -> None:
        """Keeps rows [rows, d_model] on the CPU, in place of those that are there; too many for the limit are not."""
        self.keep(name, rows.detach().to("cpu", copy=True).contiguous())

    def keep(self, name: str, rows: Tensor) -> None:
        """As :meth:`put`, of rows that are nobody else's."""
        if rows.nbytes > self.limit:
            return
        with self._lock:
            before = self._rows.pop(name, None)
            self._rows[name] = rows
            self.nbytes += rows.nbytes - (0 if before is None else before.nbytes)
            while self.nbytes > self.limit:
                self.nbytes -= self._rows.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        with self._lock:
            self._rows.clear()
            self.nbytes = 0

    def __len__(self) -> int:
        return len(self._rows)
