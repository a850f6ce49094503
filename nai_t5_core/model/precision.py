"""Which dtype and device a model runs in when the user leaves the choice to us."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Rows of a weight that are checked at a time.
_ROWS = 1024


def resolve_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is the first accelerator, else the CPU.

    Raises:
        ValueError: no such device, or it is not available here.
    """
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device {str(device)!r} cannot be used here ({reason}); try 'auto' or 'cpu'") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """``"auto"`` is float16 on accelerators: as fast as bfloat16, ten times as exact, and scales keep it in range.

    On a CPU it is bfloat16 where the processor multiplies matrices in it natively, else float32.

    Raises:
        ValueError: a name or dtype that a T5 cannot run in.
    """
    if dtype == "auto":
        if device.type in ("cuda", "mps"):
            return torch.float16
        return torch.bfloat16 if _has_native_bfloat16(device) else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _has_native_bfloat16(device: torch.device) -> bool:
    # Without these instructions a bfloat16 product on a CPU is emulated, and slower than a float32 one.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)


def advice_on(largest: float) -> str:
    """Which dtypes to use for numbers as large as this one: "use bfloat16 or float32"."""
    names = [name for name in ("bfloat16", "float32", "float64") if largest <= torch.finfo(DTYPES[name]).max]
    # Where float32 does it, double the memory is no advice.
    return f"use {' or '.join(names[:2])}" if names else "no dtype holds that"


def advice_beyond(dtype: torch.dtype) -> str:
    """The same for numbers that exceed a dtype."""
    return advice_on(2 * torch.finfo(dtype).max)


def is_finite(values: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity; allocates nothing of its size, and waits for its device."""
    return values.numel() == 0 or bool(torch.stack(values.detach().aminmax()).isfinite().all())


def largest_absolute(weight: Tensor) -> float:
    """The largest absolute value; NaN if any value is NaN."""
    low, high = weight.aminmax()
    precision = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return float(torch.stack((low, high)).to(precision).abs().max())


def largest_finite(weight: Tensor) -> float:
    """The largest absolute finite value; 0 where no value is finite. Takes float8 as well."""
    if weight.dtype.itemsize > 1 and math.isfinite(largest := largest_absolute(weight)):
        return largest
    # By rows: a float32 copy of a whole embedding table would need as much memory as a model.
    slices = (rows.float().nan_to_num(nan=0, posinf=0, neginf=0) for rows in weight.split(_ROWS))
    return max(largest_absolute(rows) for rows in slices)


def keeps_finite(original: Tensor, made: Tensor) -> bool:
    """Whether every finite value of ``original`` is finite in ``made``, a tensor of its shape that was made of it."""
    pairs = zip(original.split(_ROWS), made.split(_ROWS), strict=True)
    return all(bool((now.isfinite() | ~before.float().isfinite()).all()) for before, now in pairs)
