"""How long a call takes on a device, and how long the host needs to issue it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

_LEAST_SECONDS = 0.4  # for which a call is repeated,
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 50


def synchronize(device: torch.device) -> None:
    """Waits until a device has done all that it was given.

    Raises:
        ValueError: torch cannot wait for it, so that a clock would show when calls were issued.
    """
    if device.type == "cpu":
        return
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if wait is None:
        raise ValueError(f"torch has no torch.{device.type}.synchronize, without which {device} cannot be timed")
    # There is one of Apple's, and its module takes no number.
    wait() if device.type == "mps" else wait(device)


@dataclass(frozen=True)
class Duration:
    """Seconds of one call: until the device was done, and until the call returned."""

    whole: float
    host: float


def timed_once(call: Callable[[], Result], device: torch.device) -> tuple[Duration, Result]:
    """How long a call takes that begins when the device is idle, and its result."""
    synchronize(device)
    started = time.perf_counter()
    result = call()
    returned = time.perf_counter()
    synchronize(device)
    return Duration(time.perf_counter() - started, returned - started), result


def timed(call: Callable[[], Any], device: torch.device, warm_ups: int = 2) -> dict[str, float]:
    """Milliseconds: ``ms`` until the device is done, ``host_ms`` until the call returns (medians); ``lowest_ms``."""
    for _ in range(warm_ups):
        call()
    whole, host = list[float](), list[float]()
    while len(whole) < _LEAST_ROUNDS or (sum(whole) < _LEAST_SECONDS and len(whole) < _MOST_ROUNDS):
        duration, _ = timed_once(call, device)
        whole.append(duration.whole)
        host.append(duration.host)
    return {
        "ms": statistics.median(whole) * 1e3,
        "lowest_ms": min(whole) * 1e3,
        "host_ms": statistics.median(host) * 1e3,
    }


def device_seconds(call: Callable[[int], Any], device: torch.device, rounds: int = 20) -> float:
    """Mean seconds of ``rounds`` calls that follow each other without a wait; each gets its number as argument."""
    for number in range(2):
        call(number)
    synchronize(device)
    started = time.perf_counter()
    for number in range(rounds):
        call(number)
    synchronize(device)
    return (time.perf_counter() - started) / rounds
