"""The machine that is measured on: its threads, and its name."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def threads_set(count: int | None) -> Iterator[int]:
    """Sets torch's number of threads within the context, and yields the number in use."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else platform.system()
    return f"{device.type} ({platform.machine()}, {capability})"
