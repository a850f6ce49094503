"""How long launches take on a device by themselves: from CUDA graphs, without the time of Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import torch

_REPLAYS = 20
# Larger than any cache of a device.
_BYTES = 256 << 20


def copies_of(nbytes: int) -> int:
    """How many inputs of so many bytes are needed so that none is in a cache when it is its turn again."""
    return 1 + _BYTES // nbytes


# A kernel, the arguments of a launch, and the constants that it is compiled for.
Launch = tuple[Any, Sequence[Any], dict[str, Any]]


def compile_ahead(launches: Iterable[Launch]) -> None:
    """Compiles kernels in parallel, each for one of its launches.

    Raises:
        Exception: what Triton raises of one that does not compile.
    """
    # Triton stays in its mode after an error, and every kernel would fail from then on: within a context it does not.
    copy_context().run(_compile, launches)


def _compile(launches: Iterable[Launch]) -> None:
    import triton  # timing alone needs none

    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
        for kernel, tensors, constants in launches:
            kernel.warmup(*tensors, grid=(1,), **constants)


def seconds_of(call: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    """Seconds of one call on the current device: the mean over a graph of a call with each of some inputs.

    Raises:
        OutOfResources: a kernel needs more than the card has.
    """
    call(inputs[0])  # what is compiled or chosen at the first call is no part of a graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in inputs:
            call(each)
    return seconds_of_launches(graph.replay) / len(inputs)


def seconds_of_launches(launch: Callable[[], None]) -> float:
    """Seconds of a launch of a CUDA graph on the current device: the mean over some that follow one another."""
    launch()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(_REPLAYS):
        launch()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / _REPLAYS
