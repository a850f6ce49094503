"""Embeddings in memory, up to so many bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nai_t5_core.prompts.cache.process_lock import ProcessLock
from nai_t5_core.weights.formats import tensor_bytes


@dataclass(frozen=True)
class Embedding:
    """What is kept of a prompt.

    Attributes:
        rows: hidden states [rows, d_model].
        extras: tensors that go with them, by name.
    """

    rows: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + sum(tensor.nbytes for tensor in self.extras.values())

    def copy(self) -> Embedding:
        """Another on the CPU that shares no memory with this one."""
        extras = {name: _own(tensor) for name, tensor in self.extras.items()}
        return Embedding(_own(self.rows), extras)


def _own(tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return tensor.detach().to("cpu", copy=True)
    # Copied by this thread alone: for so few bytes, torch's threads would wait for each other longer than it takes.
    return torch.frombuffer(bytearray(tensor_bytes(tensor)), dtype=tensor.dtype).view(tensor.shape)


class MemoryStore:
    """Embeddings by the name of their key; the least recently used go out.

    What it holds belongs to it alone: it gives copies. Threads may share it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._kept: OrderedDict[str, Embedding] = OrderedDict()
        self._lock = ProcessLock()

    def get(self, name: str, least_rows: int = 1) -> Embedding | None:
        """A copy of an entry, if it has as many rows."""
        with self._lock:
            found = self._kept.get(name)
            if found is None or len(found.rows) < least_rows:
                return None
            self._kept.move_to_end(name)
        return found.copy()

    def put(self, name: str, embedding: Embedding) -> None:
        """Keeps what is nobody else's, in place of what is there; what is larger than the limit is not kept."""
        if embedding.nbytes > self.limit:
            return
        with self._lock:
            before = self._kept.pop(name, None)
            self._kept[name] = embedding
            self.nbytes += embedding.nbytes - (0 if before is None else before.nbytes)
            while self.nbytes > self.limit:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)
