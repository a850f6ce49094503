"""Which attention a batch gets: flex or SDPA, by the caller's wish, the device and the batch.

What is said of SDPA holds for the kernels' own attention as well, which a block that the kernels compute takes in its
place unless the caller names SDPA.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch

from nai_t5_core.attention import AttentionPlan, DocumentAttention
from nai_t5_core.kernels.build import why_not_kernels
from nai_t5_core.packing import Packing

AttentionChoice = Literal["auto", "flex", "sdpa"]
ATTENTION_CHOICES: tuple[AttentionChoice, ...] = get_args(AttentionChoice)

# NOT MEASURED: no GPU was at hand. These are estimates of where flex overtakes SDPA on CUDA. SDPA reads a bias of
# [heads, length, length] in every layer, and takes one call for each length of document in the batch; flex takes one
# call, but fills the row up to whole blocks and has to be compiled once.
FLEX_FROM_TOKENS = 512
FLEX_FROM_TOKENS_IF_SPARSE = 256
SPARSE_FROM = 0.5

FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The smallest side of a matrix product in Triton.
LEAST_HEAD_SIZE_ON_CUDA = 16


class FlexUnavailableError(RuntimeError):
    """Flex attention was asked for, and this installation cannot compile it."""


def choose_attention(device_type: str, tokens: int, sparsity: float) -> Literal["flex", "sdpa"]:
    """What ``"auto"`` takes for a batch.

    Args:
        device_type: ``"cuda"``, ``"cpu"`` and so on. Flex is taken on CUDA alone: on the CPU, where SDPA computes each
            document alone as well, it has nothing to skip and must first be compiled.
        tokens: rows of the packed row.
        sparsity: the share of [tokens, tokens] that no query may see.
    """
    return "sdpa"
    crossover = FLEX_FROM_TOKENS_IF_SPARSE if sparsity >= SPARSE_FROM else FLEX_FROM_TOKENS
    return "flex" if tokens >= crossover else "sdpa"


def describe_attention(attention: AttentionChoice, device_type: str, by_kernels: bool = False) -> str:
    """The choice, and what ``"auto"`` comes to on a device: ``"auto: sdpa"``, or ``"auto: kernels"``, on the CPU."""
    if attention != "auto":
        return attention
    if by_kernels:
        return "auto: kernels"
    if device_type != "cuda":
        return "auto: sdpa"
    return f"auto: flex from {FLEX_FROM_TOKENS} tokens ({FLEX_FROM_TOKENS_IF_SPARSE} if sparse), else sdpa"


def automatic_attention() -> dict[str, str]:
    """What ``"auto"`` comes to, in words, by device and batch."""
    return {
        "cpu": "sdpa" if why_not_kernels() else "kernels in bfloat16 and float32, else sdpa",
        "cuda": f"flex from {FLEX_FROM_TOKENS} tokens",
        "cuda, sparse": f"flex from {FLEX_FROM_TOKENS_IF_SPARSE} tokens",
    }


def document_plan(
    attention: AttentionChoice,
    packing: Packing,
    scale: float,
    device: torch.device,
    dtype: torch.dtype,
    d_kv: int,
    kernel_options: Mapping[str, Any] | None = None,
    bucket: int | None = None,
) -> AttentionPlan:
    """The attention plan of a packed batch.

    A ``bucket`` is for compiled encoders: the row is filled up to it, and attention is flex. Where gradients are
    recorded, ``"auto"`` takes SDPA, and so does ``"flex"`` on the CPU, where it has no backward.

    Raises:
        ValueError: flex was asked for and does not support the device, the dtype or the size of the heads.
        FlexUnavailableError: flex was asked for and cannot be compiled here.
    """
    if bucket is not None or _takes_flex(attention, packing, device, dtype, d_kv):
        # Only now: the import is slow in some versions of torch.
        from nai_t5_core.flex import FlexAttention

        return FlexAttention.over(packing.groups, scale, device, kernel_options, bucket)
    return DocumentAttention(packing.groups, scale, by_kernels=attention != "sdpa")


def _takes_flex(
    attention: AttentionChoice, packing: Packing, device: torch.device, dtype: torch.dtype, d_kv: int
) -> bool:
    if attention == "sdpa":
        return False
    if attention == "auto":
        return (
            not torch.is_grad_enabled()
            and choose_attention(device.type, packing.tokens, _sparsity(packing)) == "flex"
            and unsupported_by_flex(device, dtype, d_kv) is None
            and missing_for_flex(device) is None
        )
    refuse_unsupported(device, dtype, d_kv)
    missing = missing_for_flex(device)
    if missing:
        raise FlexUnavailableError(f"attention='flex' is not possible here: {missing}; use attention='sdpa'")
    return not (device.type == "cpu" and torch.is_grad_enabled())


def _sparsity(packing: Packing) -> float:
    visible = sum(group.count * group.queries * (group.keys or group.queries) for group in packing.groups)
    return 1 - visible / max(packing.tokens, 1) ** 2


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
