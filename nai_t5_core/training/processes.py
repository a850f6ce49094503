"""The processes that train a model together: this one alone, or those that torchrun has started."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nai_t5_core.model.precision import resolve_device

# Far more than a waiting thread needs to take the lock and free two tensors.
_FREEING_SECONDS = 0.1


@dataclass(frozen=True)
class Processes:
    """This process among its like: ``rank`` of ``count``, and the device that it computes on."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and speaks to the user."""
        return self.rank == 0

    def total(self, value: float) -> float:
        """The sum of all processes' values; all of them wait here for each other."""
        if self.count == 1:
            return value
        sums = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return float(sums)


def alone(device: str) -> Processes:
    """A run of one process, on the device of this name or choice."""
    return Processes(0, 1, resolve_device(device))


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Joins the process group that this process was started for, for as long as the context is open.

    A group that exists already is used and left as it is. On a machine with several GPUs each process takes its own.

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

    A thread of gloo's frees the tensors of a collective, for which it needs Python's lock. torch does not wait for it,
    and aborts a process that ends meanwhile: one in five that end right after a collective. Sleeping gives up the lock.
    """
    time.sleep(_FREEING_SECONDS)
    dist.destroy_process_group()
