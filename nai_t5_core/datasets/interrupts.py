"""Ctrl-C, which a terminal sends to a program and to all processes that it has started."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


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
