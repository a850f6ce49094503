"""The processes that train a model together: this one alone, or those that torchrun has started."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nai_t5_core.model.precision import resolve_device

# Far more than gloo's thread needs to take the lock and free two tensors, see _leave_group.
_FREEING_SECONDS = 0.1


@dataclass(frozen=True)
class Processes:
    """This process among those that train together: ``rank`` of ``count``, and the device that it computes on."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and speaks to the user."""
        return self.rank == 0

    def total(self, value: float) -> float:
        """The sum of all processes' values; each process waits here for all others."""
        if self.count == 1:
            return value
        sums = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return float(sums)


def alone(device: str) -> Processes:
    """This process as the only one, on a device by name or ``"auto"``."""
    return Processes(0, 1, resolve_device(device))


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Joins the process group that torchrun started this process for, within the context.

    A group that exists already is used and not ended. On a machine with several GPUs each process uses its own.

    Raises:
        ValueError: no such device.
    """
    has_group = dist.is_available() and dist.is_initialized()
    is_launched = dist.is_available() and dist.is_torchelastic_launched()
    if not has_group and not is_launched:
        yield alone(device)
        return
    place = resolve_device(device)
    if place.type == "cuda":
        place = torch.device("cuda", dist.get_node_local_rank(fallback_rank=0))
        torch.cuda.set_device(place)
    if not has_group:
        dist.init_process_group()
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), place)
    finally:
        if not has_group:
            _leave_group()


def _leave_group() -> None:
    """Ends the process group that this process has joined.

    After a collective, a thread of gloo frees its tensors, for which it needs Python's GIL. torch does not wait for
    that thread, and aborts a process that ends meanwhile (one in five that end right after a collective). Sleeping
    releases the GIL.
    """
    time.sleep(_FREEING_SECONDS)
    dist.destroy_process_group()
