"""Ctrl-C, which a terminal sends to a program and to all processes that it has started; and how these end with it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process, resource_tracker
from threading import Thread


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started within never hear it: who has started them ends them. Here it is heard afterwards.

    One that hears it would print where it was; and a pool whose workers answer with it in the place of their results
    may wait for ever.
    """
    if sys.platform == "win32":
        # Signals are not blocked there.
        yield
        return
    # Its own start, which comes with the first process else, makes signals heard again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_the_parent() -> None:
    """Ends this process as soon as the one that has started it is gone, however that has ended.

    One that is killed ends nobody, and a process that waits at a pool's queue is not told: the others of the pool hold
    its other end.
    """
    Thread(target=_outlive_nobody, name="nai-t5-parent", daemon=True).start()


def _outlive_nobody() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
