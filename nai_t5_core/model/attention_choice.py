"""Whether a batch is computed by flex attention or SDPA: chosen by the caller's argument, the device and the batch.

Where SDPA is chosen automatically, a block that our CPU kernels compute uses the kernels' own attention in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch

from nai_t5_core.model.attention import AttentionPlan, DocumentAttention
from nai_t5_core.model.block import torch_is_needed
from nai_t5_core.model.packing import Packing

AttentionChoice = Literal["auto", "flex", "sdpa"]
ATTENTION_CHOICES: tuple[AttentionChoice, ...] = get_args(AttentionChoice)

# On CUDA SDPA needs one call for each document length in a batch; flex needs one call in all, and is compiled once. On
# an H200, with a T5-XXL in float16, SDPA is faster for one prompt, equally fast with 8 lengths, and three times as slow
# with 32. In float32 flex's kernels spill registers.
FLEX_FROM_LENGTHS = 16
AUTOMATIC_FLEX_DTYPES = (torch.bfloat16, torch.float16)

FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The smallest side of a matrix product in Triton.
LEAST_HEAD_SIZE_ON_CUDA = 16


class FlexUnavailableError(RuntimeError):
    """Flex attention was asked for, and this installation cannot compile it."""


def choose_attention(
    device_type: str, lengths: int, dtype: torch.dtype, flex_from_lengths: int = FLEX_FROM_LENGTHS
) -> Literal["flex", "sdpa"]:
    """Which attention ``"auto"`` means for a batch.

    Args:
        device_type: ``"cuda"``, ``"cpu"`` and so on. Flex is chosen on CUDA alone: on the CPU it has no work to skip,
            since SDPA computes each document by itself as well, and it must first be compiled.
        lengths: how many different document lengths the batch has.
        flex_from_lengths: from how many on flex is faster on this card.
    """
    is_faster = device_type == "cuda" and lengths >= flex_from_lengths and dtype in AUTOMATIC_FLEX_DTYPES
    return "flex" if is_faster else "sdpa"


def describe_attention(
    attention: AttentionChoice,
    device_type: str,
    by_kernels: int = 0,
    blocks: int = 1,
    flex_from_lengths: int = FLEX_FROM_LENGTHS,
) -> str:
    """The choice in words, and which attention ``"auto"`` takes: ``"auto: sdpa"``, or on the CPU ``"auto: kernels"``.

    Args:
        by_kernels: how many of the ``blocks`` compute attention by our CPU kernels.
    """
    if attention != "auto":
        return attention
    if by_kernels:
        return "auto: kernels" if by_kernels == blocks else f"auto: kernels, and sdpa in {blocks - by_kernels} blocks"
    if device_type != "cuda":
        return "auto: sdpa"
    return f"auto: sdpa, and flex for batches of {flex_from_lengths} lengths and more"


def document_plan(
    attention: AttentionChoice,
    packing: Packing,
    scale: float,
    device: torch.device,
    dtype: torch.dtype,
    d_kv: int,
    kernel_options: Mapping[str, Any] | None = None,
    bucket: int | None = None,
    flex_from_lengths: int = FLEX_FROM_LENGTHS,
) -> AttentionPlan:
    """The attention plan of a packed batch.

    A ``bucket`` is for compiled encoders: the row is padded to that many tokens, and attention is flex. ``"auto"``
    takes SDPA where gradients are recorded, or a compiler or a dispatch mode of torch sees the operations; ``"flex"``
    takes SDPA on the CPU where gradients are recorded, since flex has no backward there.

    Raises:
        ValueError: flex was asked for and does not support the device, the dtype or the size of the heads.
        FlexUnavailableError: flex was asked for and cannot be compiled here.
    """
    if bucket is not None or _takes_flex(attention, packing, device, dtype, d_kv, flex_from_lengths):
        # Imported only here: the import is slow in some versions of torch.
        from nai_t5_core.model.flex import FlexAttention

        return FlexAttention.over(packing.groups, scale, device, kernel_options, bucket)
    return DocumentAttention(packing.groups, scale, by_kernels=attention != "sdpa")


def _takes_flex(
    attention: AttentionChoice,
    packing: Packing,
    device: torch.device,
    dtype: torch.dtype,
    d_kv: int,
    flex_from_lengths: int,
) -> bool:
    if attention == "sdpa":
        return False
    if attention == "auto":
        return (
            not torch_is_needed()
            and choose_attention(device.type, len(packing.groups), dtype, flex_from_lengths) == "flex"
            and unsupported_by_flex(device, dtype, d_kv) is None
            and missing_for_flex(device) is None
        )
    refuse_unsupported(device, dtype, d_kv)
    missing = missing_for_flex(device)
    if missing:
        raise FlexUnavailableError(f"attention='flex' is not possible here: {missing}; use attention='sdpa'")
    return not (device.type == "cpu" and torch.is_grad_enabled())


# ---------------------------------------------------------------------------------------------------------------------
# What flex needs
# ---------------------------------------------------------------------------------------------------------------------


def refuse_unsupported(device: torch.device, dtype: torch.dtype, d_kv: int) -> None:
    """Raises a ValueError if flex cannot compute such a model on such a device."""
    reason = unsupported_by_flex(device, dtype, d_kv)
    if reason:
        raise ValueError(f"attention='flex' cannot be used: {reason}; use attention='sdpa' or 'auto'")


def unsupported_by_flex(device: torch.device, dtype: torch.dtype, d_kv: int) -> str | None:
    """Why flex cannot compute such a model on such a device; None if it can."""
    if device.type not in ("cpu", "cuda"):
        return f"the model is on {device}; allowed: cpu, cuda"
    if dtype not in FLEX_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLEX_DTYPES)
        return f"the model is in {dtype}; allowed: {allowed}"
    if device.type == "cuda" and d_kv < LEAST_HEAD_SIZE_ON_CUDA:
        return f"heads of size {d_kv}; on CUDA they need a d_kv of at least {LEAST_HEAD_SIZE_ON_CUDA}"
    return None


def missing_for_flex(device: torch.device) -> str | None:
    """What this installation lacks to compile flex for a device; None if nothing."""
    if torch.__version__ < "2.6":
        return f"torch {torch.__version__} is too old for it; it needs 2.6"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not installed, or does not support this GPU"
    if sys.platform == "darwin" or not torch.cpu._is_avx2_supported():
        return "torch compiles it for x86 processors with AVX2 only, and not on macOS"
    return _missing_compiler()


def _missing_compiler() -> str | None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "there is no C++ compiler (install g++ or clang, or name one in the variable CXX)"
    return None
