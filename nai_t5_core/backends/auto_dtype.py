"""Which dtype a model runs in when the user leaves the choice to us."""

from __future__ import annotations

import logging
from functools import cache

import torch

from nai_t5_core.backends.kernels.build import better_than_kernels, prepare_kernels
from nai_t5_core.backends.mps import missing_on_mps
from nai_t5_core.model.precision import DTYPES

log = logging.getLogger(__name__)


def resolve_dtype(dtype: str | torch.dtype, device: torch.device, has_decoder: bool = False) -> torch.dtype:
    """``"auto"`` is float16 on accelerators: as fast as bfloat16, ten times as exact, and scales keep it in range. On
    cards that multiply it slowly it has half the memory of float32 and the same numbers; ``nai-t5 doctor`` tells.

    On a CPU it is bfloat16 where the processor multiplies matrices in it natively. It is bfloat16, too, where our
    kernels compute an encoder in float32 from weights in 16 bits (they are compiled for that, if they were not); else
    float32.

    Args:
        has_decoder: whether it is for a whole T5, whose decoder needs oneDNN for keys, values and the head.

    Raises:
        ValueError: a name or dtype that a T5 cannot run in, or not on this device.
    """
    if dtype == "auto":
        if device.type in ("cuda", "mps"):
            return torch.float16
        if _has_native_bfloat16(device):
            return torch.bfloat16
        return torch.bfloat16 if device.type == "cpu" and not has_decoder and _widens() else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    if reason := missing_on_mps(device, DTYPES[name]):
        raise ValueError(f"dtype {name!r} cannot be used on {device}: {reason}")
    return DTYPES[name]


def _has_native_bfloat16(device: torch.device) -> bool:
    # Without these instructions a bfloat16 product on a CPU is emulated, and slower than a float32 one.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)


def _widens() -> bool:
    """Whether the kernels that an automatic choice takes read weights in bfloat16."""
    if better_than_kernels() or prepare_kernels():
        return False
    _tell()
    return True


@cache
def _tell() -> None:
    log.info(
        "this processor multiplies no bfloat16: the encoder's weights stay in it, at half the memory of float32, and "
        "our kernels compute in float32"
    )
