"""Where embeddings are kept: in memory, over a folder."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from nai_t5_core.facts.given_numbers import whole_number
from nai_t5_core.facts.paths import cache_folder, user_path
from nai_t5_core.prompts.cache.disk import DiskStore
from nai_t5_core.prompts.cache.entry import FORMS, Form
from nai_t5_core.prompts.cache.key import Key
from nai_t5_core.prompts.cache.memory import Embedding, MemoryStore
from nai_t5_core.prompts.cache.process_lock import ProcessLock

MEMORY_LIMIT, DISK_LIMIT = 256_000_000, 2_000_000_000
# Entries that may wait to be written, before one who brings more waits too.
_MOST_WAITING = 64


@dataclass
class Counts:
    """What a store was asked for since it was made."""

    from_memory: int = 0
    from_disk: int = 0
    misses: int = 0

    @property
    def hits(self) -> int:
        return self.from_memory + self.from_disk


class Store:
    """Embeddings by their keys, see :mod:`nai_t5_core.prompts.cache.key`. Threads and processes may share its folder.

    >>> store = Store("~/embeddings", disk=20_000_000_000)
    >>> TextEncoder.from_pretrained("t5xxl_fp16.safetensors", cache=store)

    Args:
        folder: made when it is needed; None keeps embeddings in memory alone.
        memory, disk: bytes that are kept at most; 0 for none.
        form: how numbers are kept in the folder: ``"computed"``, or smaller: ``"bfloat16"``, ``"float16"``, or
            ``"int8"`` (with scales; an error of about 0.5%). What is kept smaller is given only to stores of the same
            form.

    Raises:
        ValueError: a limit that is no whole number, or an unknown form.
    """

    def __init__(
        self,
        folder: str | Path | None,
        memory: int = MEMORY_LIMIT,
        disk: int = DISK_LIMIT,
        form: Form = "computed",
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"unknown form {form!r}; allowed: {', '.join(FORMS)}")
        self.memory = MemoryStore(whole_number("memory", memory))
        limit = whole_number("disk", disk)
        self.disk = None if folder is None else DiskStore(user_path(folder), limit, form)
        self.counts = Counts()
        self._waiting: deque[Future[bool]] = deque()
        self._lock = ProcessLock()
        # With the process that it belongs to: a forked one has no threads.
        self._writer: tuple[int, ThreadPoolExecutor] | None = None

    def get(self, key: Key, least_rows: int = 1) -> Tensor | None:
        """The rows of an embedding [rows, d_model] on the CPU, the caller's own, or None.

        Args:
            least_rows: fewer rows are as none; more may come.
        """
        found = self.find(key, least_rows)
        return None if found is None else found.rows

    def find(self, key: Key, least_rows: int = 1) -> Embedding | None:
        """As :meth:`get`, with the tensors that go with the rows."""
        found = self.memory.get(key.digest, least_rows)
        if found is not None:
            self.counts.from_memory += 1
            return found
        found = None if self.disk is None else self.disk.get(key, least_rows)
        if found is None:
            self.counts.misses += 1
            return None
        self.counts.from_disk += 1
        self.memory.put(key.digest, found.copy())
        return found

    def put(self, key: Key, rows: Tensor, extras: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Keeps rows [rows, d_model], and tensors that go with them.

        They are written in the background; :meth:`wait` tells when all are.
        """
        own = Embedding(rows, extras).copy()
        self.memory.put(key.digest, own)
        if self.disk is None or not self.disk.limit:
            return
        with self._lock:
            self._waiting.append(self._own_writer().submit(self.disk.put, key, own))
            while len(self._waiting) > _MOST_WAITING or (self._waiting and self._waiting[0].done()):
                self._waiting.popleft().result()

    def _own_writer(self) -> ThreadPoolExecutor:
        """A thread of this process, which Python waits for at its end."""
        if self._writer is None or self._writer[0] != os.getpid():
            self._waiting.clear()
            self._writer = os.getpid(), ThreadPoolExecutor(1, "embedding cache")
        return self._writer[1]

    def wait(self) -> None:
        """Returns when all that was put is on the disk, as far as it can be."""
        with self._lock:
            is_own = self._writer is not None and self._writer[0] == os.getpid()
            while self._waiting and is_own:
                self._waiting.popleft().result()

    def clear(self) -> None:
        """Forgets everything, in the folder too.

        Raises:
            OSError: an entry cannot be removed.
        """
        self.wait()
        self.memory.clear()
        if self.disk is not None:
            self.disk.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        folder, limit, form = (None, 0, "computed") if self.disk is None else _of(self.disk)
        return Store, (folder, self.memory.limit, limit, form)

    def __repr__(self) -> str:
        where = "memory" if self.disk is None else f"memory and {self.disk.folder}"
        return f"Store({where}; {self.counts.hits} hits, {self.counts.misses} misses)"


def _of(disk: DiskStore) -> tuple[Path, int, Form]:
    return disk.folder, disk.limit, disk.form


def default_folder() -> Path:
    """Where embeddings are kept unless a folder is given."""
    return cache_folder() / "embeddings"


def open_store(cache: bool | str | Path | Store) -> Store:
    """The store of an argument ``cache``: True is the default folder.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(cache, Store):
        return cache
    if cache is True:
        return Store(default_folder())
    if isinstance(cache, str | Path) and str(cache):
        return Store(cache)
    raise ValueError(f"cache={cache!r}; give True for the default folder, a folder, or a Store")
