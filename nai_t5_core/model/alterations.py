"""What was done to an encoder's weights since they were loaded, for those who keep its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any, Protocol


class Watcher(Protocol):
    """Who has to know of every change of the weights, by whomever."""

    def look(self) -> None:
        """Called before a change that is told: what has changed until now was not told."""
        ...

    def renew(self) -> None:
        """Called after it."""
        ...


class Alterations:
    """The changes of one encoder's weights that were told: LoRAs, vectors of textual inversion, tightened scales.

    Attributes:
        done: what is in force now, by who has made it. The order is that of the first changes.
        watchers: copies of a model have none.
        lock: held over every change that is told. Who looks at the weights and at ``done`` holds it meanwhile, so that
            a change that is half told is not taken for one that is not.
    """

    def __init__(self) -> None:
        self.done: dict[object, Any] = {}
        self.watchers: list[Watcher] = []
        self.lock = RLock()

    @contextmanager
    def by(self, who: object, what: Callable[[], Any]) -> Iterator[None]:
        """While this is open the weights are changed; afterwards ``what()`` tells what is in force. Nothing is told of
        a change that failed, which leaves the weights as they were.
        """
        with self.lock:
            for watcher in self.watchers:
                watcher.look()
            yield
            self.done[who] = what()
            for watcher in self.watchers:
                watcher.renew()

    def __getstate__(self) -> dict[str, Any]:
        return {"done": dict(self.done), "watchers": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=RLock())
