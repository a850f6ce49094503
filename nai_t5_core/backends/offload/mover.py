"""What copies layers to a device beside the work there, and has each wait for the other. The host waits for neither."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from nai_t5_core.backends.offload.host_memory import HostMemory

# A point in the work of a stream, which another stream can wait for.
Event = Any


class Mover(Protocol):
    """Copies to one device in the order they are asked for; work there is what the calling thread launches."""

    @property
    def device(self) -> torch.device: ...

    def buffer(self, nbytes: int) -> Tensor:
        """Memory of the device, uint8 [nbytes], for copies and work."""
        ...

    def locked(self, nbytes: int) -> Tensor:
        """Locked memory of the host, uint8 [nbytes].

        Raises:
            MemoryError: there is not as much.
        """
        ...

    def unlock(self, memory: Tensor) -> None:
        """Makes ordinary memory of what :meth:`locked` gave; its contents stay."""
        ...

    def is_locked(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in locked memory."""
        ...

    def worked(self) -> Event:
        """The end of the work that was launched until now."""
        ...

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Event) -> Event:
        """Copies the second of each pair, in locked memory, into the first, after an event; the end of the copies."""
        ...

    def wait(self, event: Event, memory: Tensor) -> None:
        """Has the work that is launched from now on wait for an event; it will use the memory."""
        ...


class CudaMover:
    """Copies on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        # With its number, as tensors there have it.
        self._device = torch.empty(0, device=device).device
        self._copies = torch.cuda.Stream(self._device)
        # The tensors keep it.
        self._locked = WeakValueDictionary[int, HostMemory]()

    @property
    def device(self) -> torch.device:
        return self._device

    def buffer(self, nbytes: int) -> Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        # Once it is freed, nobody else gets it before the copies have ended.
        memory.record_stream(self._copies)
        return memory

    def locked(self, nbytes: int) -> Tensor:
        memory = HostMemory(nbytes)
        memory.lock(self._device)
        tensor = memory.tensor()
        self._locked[tensor.data_ptr()] = memory
        return tensor

    def unlock(self, memory: Tensor) -> None:
        self._locked.pop(memory.data_ptr()).unlock()

    def is_locked(self, tensor: Tensor) -> bool:
        return tensor.is_pinned()

    def worked(self) -> Event:
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Event) -> Event:
        self._copies.wait_event(after)
        with torch.cuda.stream(self._copies):
            for into, source in pairs:
                into.copy_(source, non_blocking=True)
        return self._copies.record_event()

    def wait(self, event: Event, memory: Tensor) -> None:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        memory.record_stream(stream)
