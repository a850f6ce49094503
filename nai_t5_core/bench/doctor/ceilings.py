"""How fast the machine reads and copies memory and multiplies matrices: upper limits for any encoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nai_t5_core.backends.kernels.build import best_set, prepare_kernels, why_not_kernels
from nai_t5_core.bench.clock import device_seconds
from nai_t5_core.bench.doctor.patient import Finding, Patient
from nai_t5_core.bench.speed.limits import register_rate

_COPIED_BYTES = {"cpu": 1 << 28, "mps": 1 << 29, "cuda": 1 << 31}
_SIDE = {"cpu": 1024, "mps": 4096, "cuda": 8192}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def measure(patient: Patient) -> Finding:
    """Bytes per second of reading and of copying (bytes read plus written), operations per second of products."""
    device = patient.device
    copied, read = _memory_rates(device)
    return {
        "copy_bytes_per_second": copied,
        "read_bytes_per_second": read,
        "products": {name: _rate(make, patient) for name, make in _kinds(device).items()} | _of_kernels(device),
    }


def _of_kernels(device: torch.device) -> dict[str, float]:
    """Operations per second of the instructions by which our CPU kernels multiply, on registers.

    On a CPU torch's products of plain matrices are no upper limit: they rearrange both in every call.
    """
    if device.type != "cpu" or why_not_kernels() is not None or prepare_kernels() is not None:
        return {}
    instructions = best_set()
    assert instructions is not None
    kinds = {str(kept).removeprefix("torch."): kept for kept, _ in instructions.kinds}
    return {name: max(register_rate(kept, instructions) for _ in range(3)) for name, kept in kinds.items()}


def _memory_rates(device: torch.device) -> tuple[float, float]:
    """Bytes per second of a copy, and of reading alone."""
    source = torch.randint(255, (_COPIED_BYTES[device.type],), dtype=torch.uint8, device=device)
    target, as_numbers = torch.empty_like(source), source.view(torch.int64)
    copying = device_seconds(lambda _: target.copy_(source), device, 10)
    reading = device_seconds(lambda _: as_numbers.amax(), device, 10)
    return 2 * source.numel() / copying, source.numel() / reading


def _rate(make: Callable[[int], Callable[[], Tensor]], patient: Patient) -> float | str:
    """Operations per second, or the error where the device cannot multiply in this dtype."""
    side = _SIDE[patient.device.type]
    try:
        multiply = make(side)
        seconds = device_seconds(lambda _: multiply(), patient.device, 10)
    except (RuntimeError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return 2 * side**3 / seconds


def _kinds(device: torch.device) -> dict[str, Callable[[int], Callable[[], Tensor]]]:
    """By dtype: a function from a side length to a call that multiplies two random square matrices of it."""

    def plain(dtype: torch.dtype) -> Callable[[int], Callable[[], Tensor]]:
        def make(side: int) -> Callable[[], Tensor]:
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            return lambda: a @ b.t()

        return make

    def whole_numbers(side: int) -> Callable[[], Tensor]:
        a, b = (torch.randint(-127, 128, (side, side), device=device, dtype=torch.int8) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())

    def float8(side: int) -> Callable[[], Tensor]:
        a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)

    kinds = {str(dtype).removeprefix("torch."): plain(dtype) for dtype in _DTYPES}
    return kinds | ({"int8": whole_numbers, "float8": float8} if device.type == "cuda" else {})
