"""Functions that launch the Triton kernels between products whose both sides are in 8 bits."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nai_t5_core.backends.cuda import byte_kernels
from nai_t5_core.backends.cuda.activations import Bytes, Sums
from nai_t5_core.backends.cuda.launches import empty_bytes, norm_warps, overlapping
from nai_t5_core.facts.config import Activation

_BLOCK = 1024
# The widest row that stays in registers; of a wider one as many numbers as leave room for those that follow.
_WIDEST, _OF_WIDER = 16384, 8192


def rounded_rows(x: Tensor, dtype: torch.dtype, compute_dtype: torch.dtype, overlaps: bool = False) -> Bytes:
    """[tokens, width] in any float dtype to bytes in ``dtype``."""
    rows, width = x.shape
    out = empty_bytes(rows, width, dtype, compute_dtype, x.device)
    block = rounding_block(width)
    constants = {"width": width, "block": block, "num_warps": norm_warps(block)}
    byte_kernels.round_rows[(rows,)](x, out.raw, out.scales, **constants, **overlapping(overlaps))
    return out


def rounding_block(width: int) -> int:
    """How many numbers of a row :func:`rounded_rows` has in registers: all of most models' rows."""
    whole = triton.next_power_of_2(width)
    return whole if whole <= _WIDEST else _OF_WIDER


def as_numbers(sums: Sums, dtype: torch.dtype) -> Tensor:
    """[tokens, columns] in ``dtype``."""
    rows, width = sums.values.shape
    out = torch.empty_like(sums.values, dtype=dtype)
    block = min(_BLOCK, triton.next_power_of_2(width))
    grid = (rows, triton.cdiv(width, block))
    scales = (sums.row_scales, sums.column_scales)
    byte_kernels.number_sums[grid](sums.values, *scales, out, width=width, block=block, num_warps=4)
    return out


def gated_in_bytes(
    joined: Tensor | Sums, activation: Activation, is_gated: bool, dtype: torch.dtype, compute_dtype: torch.dtype
) -> Bytes:
    """act(gate) · up of [tokens, 2 · d_ff], gate first, or act of [tokens, d_ff]: [tokens, d_ff] in 8 bits."""
    has_scales = isinstance(joined, Sums)
    values = joined.values if isinstance(joined, Sums) else joined
    scales = (joined.row_scales, joined.column_scales) if isinstance(joined, Sums) else (joined, joined)
    rows, width = values.shape[0], values.shape[1] // (2 if is_gated else 1)
    out = empty_bytes(rows, width, dtype, compute_dtype, values.device)
    constants = {"width": width, "activation": activation, "is_gated": is_gated, "has_scales": has_scales}
    constants["block"] = min(_BLOCK, triton.next_power_of_2(width))
    byte_kernels.gate_in_bytes[(rows,)](values, *scales, out.raw, out.scales, **constants, num_warps=4)
    return out
