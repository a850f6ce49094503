"""Which dtypes there are, which device is meant, and what numbers a dtype holds."""

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
# The compiler of torch 2.5 looks through a tuple, and not through the values of a dictionary.
COMPUTED_IN = tuple(DTYPES.values())
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
            # Its first sentence; some go on for a page.
            reason = str(error).splitlines()[0].partition(". ")[0]
            raise ValueError(f"device {str(device)!r} cannot be used here ({reason}); try 'auto' or 'cpu'") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


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
    return values.numel() == 0 or bool(all_finite(values))


def all_finite(values: Tensor) -> Tensor:
    """The same of a tensor that is not empty, as a bool tensor [] on its device, which is not waited for."""
    return torch.stack(values.detach().aminmax()).isfinite().all()


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


def within_range(states: Tensor, dtype: torch.dtype) -> Tensor:
    """The residual stream in the model's dtype. What exceeds float16 becomes its largest number, and never infinity."""
    if dtype == torch.float16 and states.dtype != dtype:
        limit = torch.finfo(dtype).max
        states = states.clamp(-limit, limit)
    return states.to(dtype)
