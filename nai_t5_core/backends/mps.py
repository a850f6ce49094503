"""What Apple's Metal does not compute, told before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# Versions of macOS from which on Metal has bfloat16.
_BFLOAT16_FROM = (14, 0)
_FLOAT8_PREFIX = "torch.float8"


def missing_on_mps(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model cannot be computed in this dtype on a device of Apple's, as a sentence; None if it can, and for
    other devices.
    """
    if device.type != "mps":
        return None
    if dtype == torch.float64:
        return "Metal has no float64; use float32, or device='cpu'"
    if dtype == torch.bfloat16 and not torch.backends.mps.is_macos_or_newer(*_BFLOAT16_FROM):
        return "Metal has bfloat16 from macOS 14 on; use float16, which is as fast and more exact"
    return None


def kept_off_mps(device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
    """Why tensors of these dtypes cannot lie on a device of Apple's, as a sentence; None if they can."""
    found = {dtype for dtype in dtypes if dtype == torch.float64 or str(dtype).startswith(_FLOAT8_PREFIX)}
    if device.type != "mps" or not found:
        return None
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
    return (
        f"the file has quantised weights in {names}, which Metal does not have; give unpack=True, which makes numbers "
        "of the model's dtype of them while they are loaded, or device='cpu'"
    )
