"""A device that copies beside its work, simulated: who waits for whom, whether that suffices, and how long it takes.

Its memory is the CPU's. Each operation on a part of its memory belongs to a stream and is compared with all that were
there before: of a write and any other, one has to happen before the other by what streams and events promise. So a
fault is found in every order of events in which it could happen, whichever order this run has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# For each stream, how many of its operations have happened, and when the last of them has ended.
Clock = dict[str, int]


class RaceError(AssertionError):
    """Two operations on one memory, of which one writes, may happen in either order."""


@dataclass(frozen=True)
class Point:
    """An event: what has happened by then, and when that is."""

    clock: Clock
    time: float


@dataclass
class Stream:
    name: str
    clock: Clock = field(default_factory=dict)
    time: float = 0.0

    def wait(self, point: Point) -> None:
        self.clock = {name: max(self.clock.get(name, 0), point.clock.get(name, 0)) for name in self.clock | point.clock}
        self.time = max(self.time, point.time)

    def point(self) -> Point:
        return Point(dict(self.clock), self.time)

    def run(self, seconds: float) -> Point:
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        self.time += seconds
        return self.point()


@dataclass
class Memory:
    """The last write to a piece of memory, and the reads since then: the stream of each and its point there."""

    write: tuple[str, Point] | None = None
    reads: list[tuple[str, Point]] = field(default_factory=list)


class SimulatedDevice(TorchDispatchMode):
    """A mover, and a mode in which operations on its memory are seen.

    Attributes:
        copies: bytes of the pieces of each copy.
        buffers: bytes of each memory of the device.
        work: the stream that operations are on.
        seconds: of the copy of a byte, and of the work on a byte.
    """

    device = torch.device("cpu")

    def __init__(self, seconds: tuple[float, float] = (1.0, 0.5), room: int | None = None) -> None:
        super().__init__()
        self.seconds, self.room = seconds, room
        self.copies: list[list[int]] = []
        self.buffers: list[int] = []
        self.work, self._copying = Stream("work"), Stream("copies")
        self._memories: dict[int, Memory] = {}
        self._locked: dict[int, Tensor] = {}

    # As a mover.

    def buffer(self, nbytes: int) -> Tensor:
        self.buffers.append(nbytes)
        memory = torch.full((nbytes,), 255, dtype=torch.uint8)  # as float numbers NaN
        self._memories[memory.data_ptr()] = Memory()
        self._accessed(memory, self.work, self.work.run(0), is_write=True)
        return memory

    def locked(self, nbytes: int) -> Tensor:
        if self.room is not None and self.room < nbytes:
            raise MemoryError(f"no room for {nbytes} bytes")
        self.room = self.room and self.room - nbytes
        memory = torch.zeros(nbytes, dtype=torch.uint8)
        self._locked[memory.data_ptr()] = memory
        return memory

    def unlock(self, memory: Tensor) -> None:
        del self._locked[memory.data_ptr()]

    def is_locked(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._locked

    def worked(self) -> Point:
        return self.work.point()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Point | None) -> Point:
        pairs = list(pairs)
        if after is not None:
            self._copying.wait(after)
        for into, source in pairs:
            assert self.is_locked(source), "a copy from memory that is not locked is waited for"
            into.copy_(source)
            self._accessed(into, self._copying, self._copying.run(len(source) * self.seconds[0]), is_write=True)
        self.copies.append([len(source) for _, source in pairs])
        return self._copying.point()

    def wait(self, event: Point, memory: Tensor) -> None:
        self.work.wait(event)

    # As a mode.

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [value for value in tree_flatten((args, kwargs))[0] if self._is_here(value)]
        out = operation(*args, **kwargs)
        given = {each.untyped_storage().data_ptr() for each in tree_flatten(out)[0] if isinstance(each, Tensor)}
        for tensor in read:
            # A view of it is not yet its contents.
            if tensor.untyped_storage().data_ptr() not in given:
                self._accessed(tensor, self.work, self.work.run(tensor.nbytes * self.seconds[1]), is_write=False)
        return out

    def _is_here(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._memories

    def _accessed(self, tensor: Tensor, stream: Stream, now: Point, is_write: bool) -> None:
        memory = self._memories[tensor.untyped_storage().data_ptr()]
        before = [memory.write] if memory.write else []
        for name, then in before + (memory.reads if is_write else []):
            if now.clock.get(name, 0) < then.clock[name]:
                raise RaceError(f"{stream.name} {'writes' if is_write else 'reads'} what {name} may still be using")
        if is_write:
            memory.write, memory.reads = (stream.name, now), []
        else:
            memory.reads.append((stream.name, now))
