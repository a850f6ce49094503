"""The order of copies and work: two pieces of a device's memory that the layers take in turns.

While a layer computes, the next one's copy is under way, or has ended. When it has computed, its place takes the layer
after the next: after the last layer come the first ones, for the next encode. Nobody waits but the device's own
streams: the work for the end of the copy of what it reads, and a copy for the end of the work on what it overwrites.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from nai_t5_core.backends.offload.mover import Event, Mover
from nai_t5_core.backends.offload.weights import Layout, Place, lay_together, refuse_hooked, runs, view, weights_of

# Called with a function that gives weights other memory, and the same values, and calls it.
Tell = Callable[[Callable[[], None]], None]


@dataclass
class _Brought:
    """A layer that is on the device, or on its way there."""

    index: int
    weights: list[Tensor]
    state: list[tuple[int, int]]
    layout: Layout
    arrived: Event


@dataclass
class _Slot:
    """One of the two places; ``free`` is the end of the work on what was in it."""

    memory: Tensor
    free: Event
    brought: _Brought | None = None

    def holds(self, index: int, weights: list[Tensor]) -> bool:
        """Whether it has a layer, with the weights that this has now."""
        there = self.brought
        if there is None or there.index != index or len(there.weights) != len(weights):
            return False
        are_same = all(a is b for a, b in zip(there.weights, weights, strict=True))
        return are_same and there.state == _state(weights)

    def place(self, weight: Tensor) -> Tensor:
        """A weight of the layer in this place; any other tensor as it is."""
        there = self.brought
        assert there is not None
        for own, start in zip(there.weights, there.layout.starts, strict=True):
            if own is weight:
                return view(self.memory, start, weight)
        return weight


class Ring:
    """Brings each layer in time. It is entered by one thread at a time.

    Args:
        mover: copies to the device.
        count: of the layers.
        nbytes: of the largest.
        blocks: the layers, as far as they are known before they are entered. No reference to them is kept.
        tell: calls a function that lays weights together.
    """

    def __init__(self, mover: Mover, count: int, nbytes: int, tell: Tell, blocks: Iterable[nn.Module] = ()) -> None:
        self._mover, self._count, self._tell = mover, count, tell
        self._blocks = {index: weakref.ref(block) for index, block in enumerate(blocks)}
        self._slots = [_Slot(self._buffer(nbytes), mover.worked()) for _ in range(2)]

    @property
    def nbytes(self) -> int:
        """What the two places take of the device's memory."""
        return sum(slot.memory.nbytes for slot in self._slots)

    def lock(self, block: nn.Module) -> None:
        """See :func:`lock_weights`."""
        lock_weights(block, self._mover, self._tell)

    @contextmanager
    def layer(self, index: int, block: nn.Module) -> Iterator[Place]:
        """While this is open, work that is launched finds the weights of a layer where the result has them.

        Raises:
            MemoryError: weights were replaced, and no memory can be locked for the new ones.
        """
        slot = self._enter(index, block)
        try:
            yield slot.place
        finally:
            self._leave(slot, index)

    def _enter(self, index: int, block: nn.Module) -> _Slot:
        self._blocks[index] = weakref.ref(block)
        refuse_hooked(block)
        weights = weights_of(block)
        slot = next((slot for slot in self._slots if slot.holds(index, weights)), None)
        if slot is None:
            slot, other = self._slots
            self._bring(slot, index)
            self._bring(other, (index + 1) % self._count)
        assert slot.brought is not None
        self._mover.wait(slot.brought.arrived, slot.memory)
        return slot

    def _leave(self, slot: _Slot, index: int) -> None:
        slot.free = self._mover.worked()
        self._bring(slot, (index + 2) % self._count)

    def _bring(self, slot: _Slot, index: int) -> None:
        """Starts the copy of a layer into a place, unless it is there; a layer that was never entered is not known."""
        found = self._blocks.get(index)
        block = None if found is None else found()
        if block is None or slot.holds(index, weights_of(block)):
            return
        slot.brought = None
        refuse_hooked(block)
        self.lock(block)
        weights = weights_of(block)
        layout = Layout.of(weights)
        if layout.nbytes > slot.memory.nbytes:
            slot.memory, slot.free = self._buffer(layout.nbytes), self._mover.worked()
        pairs = [(slot.memory[start : start + len(piece)], piece) for start, piece in runs(weights, layout)]
        arrived = self._mover.copy(pairs, slot.free)
        slot.brought = _Brought(index, weights, _state(weights), layout, arrived)

    def _buffer(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):  # else only inference mode could write to it
            return self._mover.buffer(nbytes)


class HasRing(Protocol):
    """What brings layers by a ring."""

    @property
    def ring(self) -> Ring: ...


@torch.inference_mode(False)
def lock_weights(block: nn.Module, mover: Mover, tell: Tell) -> Tensor | None:
    """Has a block's weights lie in locked memory; all that do not yet, together.

    Returns:
        The memory that was locked for that, if any was.

    Raises:
        MemoryError: there is not as much. The block is as it was.
    """
    loose = [each for each in weights_of(block) if not (mover.is_locked(each) and each.is_contiguous())]
    if not loose:
        return None
    memory = mover.locked(Layout.of(loose).nbytes)
    tell(lambda: lay_together(block, loose, memory))
    return memory


def _state(weights: list[Tensor]) -> list[tuple[int, int]]:
    """Changes whenever a weight was written to or has other memory. Inference tensors do not count what is written."""
    return [(weight.data_ptr(), -1 if weight.is_inference() else weight._version) for weight in weights]
