"""A lock that a forked process finds open.

Where a process is forked while a thread holds a lock, the new one has the lock held, and not the thread that would let
it go. What the store guards is whole files and tables of whole entries, which may be used as they are then.
"""

from __future__ import annotations

import os
from threading import Lock
from weakref import WeakSet


class ProcessLock:
    """``with lock:`` as of :class:`threading.Lock`, among the threads of one process."""

    def __init__(self) -> None:
        self._lock = Lock()
        _ALL.add(self)

    def renew(self) -> None:
        """Nobody holds it any more."""
        self._lock = Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_ALL: WeakSet[ProcessLock] = WeakSet()


def _renew_all() -> None:
    for lock in list(_ALL):
        lock.renew()


# Windows forks no process.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
