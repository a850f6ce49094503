"""Whether the kernels for CUDA can run on a device, whatever the model. A hit of the cache asks for it, too."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from nai_t5_core.backends.cuda.card import COMPILED_FOR_AMD, card_of

COMPUTE_DTYPES = (torch.float16, torch.bfloat16)
LEAST_CAPABILITY = (8, 0)  # of NVIDIA's
# What the kernels call to overlap launches is here from Triton 3.4 on; older ones do not even compile those that do not
# overlap, whatever the card.
_WAITS_FOR_LAUNCHES = Path("language", "extra", "cuda", "gdc.py")
# Of the CUDA that a driver is for.
_GRAPHS_OVERLAP_FROM = 12030
BYTES_NOT_FOR_AMD = "the kernels for weights in 8 bits were compiled for NVIDIA's cards only"


def missing_triton() -> str | None:
    """What this installation lacks, as a sentence; None if nothing.

    Files are looked for, since importing Triton takes longer than reading a kept embedding.
    """
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return "Triton is not installed (torch for CUDA brings it along on Linux; elsewhere install it by itself)"
    if not Path(found.origin).parent.joinpath(_WAITS_FOR_LAUNCHES).exists():
        return (
            "the Triton here is older than 3.4 and cannot compile the kernels: install torch 2.8 or later, which "
            "brings a newer one"
        )
    return None


def missing_to_overlap() -> str | None:
    """What the installed Triton or the driver lacks to let launches overlap, as a sentence; None if nothing."""
    from triton.language.extra import cuda

    # What Triton 3.4 has of it takes an argument that its own compiler no longer gives.
    if "_semantic" not in inspect.signature(cuda.gdc_wait).parameters:
        return "it needs Triton 3.5 or later, which torch 2.9 brings along"
    driver = cuda_of_driver()
    if driver is not None and driver < _GRAPHS_OVERLAP_FROM:
        return f"the driver is for CUDA {driver // 1000}.{driver % 1000 // 10}; launches in graphs overlap from 12.3 on"
    return None


@cache
def cuda_of_driver() -> int | None:
    """The newest CUDA that the driver is for, such as 12030 of 12.3; None where there is no driver of NVIDIA's."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        version = ctypes.c_int()
        return version.value if library.cuDriverGetVersion(ctypes.byref(version)) == 0 else None
    return None


def missing_for_8_bits(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no encoder in this dtype can be computed from weights in 8 bits on a card, as a sentence; None if it can."""
    if missing := missing_triton():
        return missing
    if dtype not in COMPUTE_DTYPES:
        return f"8 bits on CUDA are for {_allowed_dtypes()}, the model is in {dtype}"
    return next(_device_obstacles(device), None) or (BYTES_NOT_FOR_AMD if is_amd(device) else None)


def obstacles_of(device: torch.device, dtype: torch.dtype, d_kv: int) -> Iterator[str]:
    """Why the kernels cannot compute layers in a dtype, with heads of a size, on a device."""
    if missing := missing_triton():
        yield missing
    if dtype not in COMPUTE_DTYPES:
        yield f"the model is in {dtype}; allowed: {_allowed_dtypes()}"
    if d_kv < 16 or d_kv & (d_kv - 1):
        yield f"heads of size {d_kv}; allowed: powers of two from 16 on"
    yield from _device_obstacles(device)


def _allowed_dtypes() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPUTE_DTYPES)


def is_amd(device: torch.device) -> bool:
    card = card_of(device)
    return card is not None and card.is_amd


def _device_obstacles(device: torch.device) -> Iterator[str]:
    if device.type == "cuda":
        card = card_of(device)
        if card is not None and card.is_amd and card.architecture not in COMPILED_FOR_AMD:
            allowed = ", ".join(COMPILED_FOR_AMD)
            yield f"the GPU is a {card.name}, {card.architecture}; of AMD's they were compiled for {allowed}"
        if card is not None and not card.is_amd and card.capability < LEAST_CAPABILITY:
            yield f"the GPU has compute capability {card.capability}; at least {LEAST_CAPABILITY} is needed"
    elif device.type != "cpu" or not is_interpreted():
        yield f"the model is on {device}; allowed: cuda"


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    from triton.runtime.interpreter import InterpretedFunction

    from nai_t5_core.backends.cuda import kernels

    return isinstance(kernels.attend, InterpretedFunction)
