"""Who may use a model now: any number of calls at once, or one that changes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Condition, RLock, local
from typing import Any


class _OfThisThread(local):
    """What a thread has under way: each sees its own numbers."""

    calls = 0
    changes = 0


class Turns:
    """The calls and changes of one model, from whichever threads they come.

    A call finds the model as it was before a change or as it is after it. A change waits for the calls that run, and
    calls that come meanwhile wait for it. A thread that has its turn may call again, and one that changes may change
    again. Copies of a model have turns of their own.

    Attributes:
        one_at_a_time: whether calls wait for each other as well: of a model that has room for one call's layers. It is
            set within a change, and holds for the calls that wait for that.
    """

    def __init__(self, one_at_a_time: bool = False) -> None:
        self.one_at_a_time = one_at_a_time
        self._alone = RLock()
        self._moved = Condition()
        self._mine = _OfThisThread()
        self._threads_that_call = self._waiting_changes = 0
        self._is_changing = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """While this is open the model stays as it is."""
        # In this order: who waits for a change does not keep the one who changes from calling.
        with self._between_changes(), self._alone if self.one_at_a_time else nullcontext():
            yield

    @contextmanager
    def _between_changes(self) -> Iterator[None]:
        mine = self._mine
        is_first = not (mine.calls or mine.changes)
        if is_first:
            with self._moved:
                while self._waiting_changes or self._is_changing:
                    self._moved.wait()
                self._threads_that_call += 1
        mine.calls += 1
        try:
            yield
        finally:
            mine.calls -= 1
            if is_first:
                with self._moved:
                    self._threads_that_call -= 1
                    self._moved.notify_all()

    @contextmanager
    def change(self) -> Iterator[None]:
        """While this is open no other thread calls or changes the model.

        Raises:
            RuntimeError: this thread is within a call, such as in a hook, which would wait for itself.
        """
        mine = self._mine
        if mine.changes:
            yield
            return
        if mine.calls:
            raise RuntimeError("the model cannot be changed from within its own call; change it before or after")
        self._wait_for_calls()
        mine.changes += 1
        try:
            yield
        finally:
            mine.changes -= 1
            with self._moved:
                self._is_changing = False
                self._moved.notify_all()

    def _wait_for_calls(self) -> None:
        with self._moved:
            self._waiting_changes += 1
            try:
                while self._threads_that_call or self._is_changing:
                    self._moved.wait()
                self._is_changing = True
            finally:
                self._waiting_changes -= 1
                self._moved.notify_all()

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, (self.one_at_a_time,)
