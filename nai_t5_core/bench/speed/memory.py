"""The memory that a call needs while it runs, beside the weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_CPU = 0


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """The peak of torch's allocations on the device during a call, its result included, above those before it.

    None on devices other than the CPU and CUDA. What libraries such as oneDNN allocate by themselves is not counted.
    """
    if device.type == "cuda":
        return _peak_on_cuda(call, device)
    return _peak_on_cpu(call) if device.type == "cpu" else None


def _peak_on_cuda(call: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(call: Callable[[], Any]) -> int:
    """The peak from the profiler's trace, which has an event with a number of bytes for each allocation and release."""
    with tempfile.TemporaryDirectory(prefix="nai-t5-bench-") as folder:
        trace = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = call()
        profiler.export_chrome_trace(str(trace))
        del result
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    sizes = [event["args"] for event in events if event.get("name") == "[memory]"]
    allocated = peak = 0
    for size in sorted((size for size in sizes if size["Device Type"] == _CPU), key=lambda size: size["Ev Idx"]):
        allocated += size["Bytes"]
        peak = max(peak, allocated)
    return peak
