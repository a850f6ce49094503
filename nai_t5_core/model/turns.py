"""Who may use a model now: any number of calls at once, or one that changes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, get_ident
from typing import Any


class Turns:
    """The calls and changes of one model, from whichever threads they come.

    A call finds the model as it was before a change or as it is after it. A change waits for the calls that run, and
    calls that come meanwhile wait for it. A thread that has its turn may call again, and one that changes may change
    again. Copies of a model have turns of their own.
    """

    def __init__(self) -> None:
        self._moved = Condition()
        self._calls: Counter[int] = Counter()  # of each thread, those that run within each other
        self._changing: int | None = None
        self._waiting = 0

    @contextmanager
    def call(self) -> Iterator[None]:
        """While this is open the model stays as it is."""
        me = get_ident()
        with self._moved:
            while me not in self._calls and self._changing != me and (self._waiting or self._changing is not None):
                self._moved.wait()
            self._calls[me] += 1
        try:
            yield
        finally:
            with self._moved:
                self._calls[me] -= 1
                if not self._calls[me]:
                    del self._calls[me]
                    self._moved.notify_all()

    @contextmanager
    def change(self) -> Iterator[None]:
        """While this is open no other thread calls or changes the model.

        Raises:
            RuntimeError: this thread is within a call, such as in a hook, which would wait for itself.
        """
        me = get_ident()
        if self._changing == me:
            yield
            return
        with self._moved:
            if me in self._calls:
                raise RuntimeError("the model cannot be changed from within its own call; change it before or after")
            self._waiting += 1
            try:
                while self._calls or self._changing is not None:
                    self._moved.wait()
                self._changing = me
            finally:
                self._waiting -= 1
        try:
            yield
        finally:
            with self._moved:
                self._changing = None
                self._moved.notify_all()

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, ()
