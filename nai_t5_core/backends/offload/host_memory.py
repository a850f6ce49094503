"""Memory of the host that a GPU's copy engine reads by itself, since it is locked: never swapped, never moved."""

from __future__ import annotations

import mmap
import sys
from typing import Any

import torch
from torch import Tensor

# Of cudaHostRegister: the memory counts as locked for every device.
_PORTABLE = 1

# torch's own allocator of locked memory takes powers of two: for a layer of a T5-XXL a third more than it needs.
_PRIVATE: dict[str, Any] = {}
_NO_MORE = (
    "the system did not lock {:.2f} GB more of its memory for the GPU ({}), which an offloaded encoder needs for each "
    "layer: free memory, allow more (under WSL, memory= in .wslconfig), or take a file in 8 or 4 bits, which needs a "
    "half or a quarter"
)
if hasattr(mmap, "MAP_ANONYMOUS"):
    _PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}


class HostMemory(mmap.mmap):
    """Zeroed memory in pages of its own, which are locked on demand, and unlocked when it is freed."""

    _locked_for: torch.device | None = None
    _address = 0

    def __new__(cls, nbytes: int) -> HostMemory:
        try:
            return super().__new__(cls, -1, nbytes, **_PRIVATE)
        except OSError as error:
            raise MemoryError(_NO_MORE.format(nbytes / 1e9, error.strerror)) from error

    def tensor(self) -> Tensor:
        """The memory as uint8 [bytes]. It is freed when no tensor of it is left."""
        return torch.frombuffer(self, dtype=torch.uint8)

    def lock(self, device: torch.device) -> None:
        """Locks the pages.

        Raises:
            MemoryError: the system does not lock as much; the message says what to do.
        """
        address = self.tensor().data_ptr()
        with torch.cuda.device(device):
            status = int(torch.cuda.cudart().cudaHostRegister(address, len(self), _PORTABLE))
            if status:
                _clear_error(device)
        if status:
            raise MemoryError(_NO_MORE.format(len(self) / 1e9, f"CUDA's error {status}"))
        self._locked_for, self._address = device, address

    def unlock(self) -> None:
        """Makes ordinary memory of it, with what it has, if it is locked."""
        if self._locked_for is None:
            return
        # A copy may still be under way, of which no event is left.
        torch.cuda.synchronize(self._locked_for)
        torch.cuda.cudart().cudaHostUnregister(self._address)
        self._locked_for = None

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.unlock()


def _clear_error(device: torch.device) -> None:
    """Takes the error from CUDA, which would tell it at the next launch, whatever that is."""
    try:
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except RuntimeError:
        pass
