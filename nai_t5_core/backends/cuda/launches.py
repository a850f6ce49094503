"""Functions that launch the Triton kernels on tensors: they allocate outputs and choose grids and block sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from nai_t5_core.backends.cuda import kernels
from nai_t5_core.backends.cuda.activations import Activations, Bytes, Sums
from nai_t5_core.backends.cuda.attention_shapes import AttentionShape
from nai_t5_core.facts.config import Activation

_GATE_BLOCK = 1024

# Distances beyond the bias's reach that a table has room for: as many as a program's queries and one step's keys.
MARGIN = 256
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Documents:
    """The table of documents, [blocks, 5] int32, from :func:`nai_t5_core.backends.cuda.documents.document_table`.

    A row of the table stands for as many queries as a program of this ``shape`` has. The table is on their device.
    """

    table: Tensor
    shape: AttentionShape


@dataclass(frozen=True)
class Watch:
    """Where the final norm notes that a value is not finite.

    ``finite``, int32 [1], is set to 0 then and left alone otherwise; only the first ``count`` rows, int32 [1], are
    checked.
    """

    finite: Tensor
    count: Tensor


def attention_table(bias: Tensor) -> Tensor:
    """The bias by distance as :func:`attend` reads it.

    Args:
        bias: [heads, 2 · reach + 1] in any float dtype.

    Returns:
        [heads, 2 · (reach + MARGIN) + 1] float32: multiplied by log2(e), and with the outermost numbers repeated, so
        that the kernel need not clamp distances.
    """
    before, behind = (bias[:, end, None].expand(-1, MARGIN) for end in (0, -1))
    return torch.cat((before, bias, behind), 1).float() * _LOG2_E


def attend(qkv: Tensor, table: Tensor, documents: Documents, scale: float, overlaps: bool = False) -> Tensor:
    """Self-attention of every document.

    Args:
        qkv: [tokens, 3 · heads · d_kv], queries, keys and values side by side; d_kv a power of two from 16 on.
        table: the bias, from :func:`attention_table`, contiguous.
        scale: of q · k.
        overlaps: whether this launch overlaps with those before and after it, see
            :meth:`nai_t5_core.backends.cuda.torch_products.Products.overlaps`.

    Returns:
        [tokens, heads · d_kv] like ``qkv``; rows that belong to no document are not written.
    """
    out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
    tensors, constants = attention_arguments(qkv, table, documents, out, scale, overlaps)
    kernels.attend[len(table), len(documents.table)](*tensors, **constants)
    return out


def attention_arguments(
    qkv: Tensor, table: Tensor, documents: Documents, out: Tensor, scale: float, overlaps: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The kernel's arguments for :func:`attend`: those of the call, and the constants that it is compiled for."""
    heads, distances = table.shape
    shape = documents.shape
    constants = {
        "heads": heads,
        "d_kv": out.shape[1] // heads,
        "reach": distances // 2 - MARGIN,
        "margin": MARGIN,
        "query_block": shape.queries,
        "key_block": shape.keys,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
        **overlapping(overlaps),
    }
    return (qkv, table, documents.table, out, scale * _LOG2_E), constants


def add_norm(
    residual: Tensor,
    delta: Tensor | Sums | None,
    inv_scale: float,
    epsilon: float,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    watch: Watch | None = None,
    overlaps: bool = False,
    factor: float = 1.0,
) -> Tensor:
    """residual += inv_scale · Σ delta, then x / sqrt(mean(x²) + eps) · weight · factor.

    Args:
        residual: [tokens, d_model] float32, changed in place.
        delta: [tokens, d_model], or partial sums [parts, tokens, d_model], in any float dtype; or sums of products of
            bytes; None adds nothing.
        dtype: of the result.
        weight: [d_model] in any float dtype, or None for ones.

    Returns:
        [tokens, d_model] in ``dtype``.
    """
    out = torch.empty_like(residual, dtype=dtype)
    _add_norm(residual, delta, inv_scale, epsilon, out, weight, watch, overlaps, factor)
    return out


def add_norm_in_form(
    residual: Tensor,
    delta: Tensor | Sums | None,
    inv_scale: float,
    epsilon: float,
    dtype: torch.dtype,
    in_bytes: torch.dtype | None,
    weight: Tensor | None,
    overlaps: bool = False,
) -> Activations:
    """As :func:`add_norm`; the result is in 8 bits of the dtype ``in_bytes``, unless that is None."""
    if in_bytes is None:
        return add_norm(residual, delta, inv_scale, epsilon, dtype, weight, overlaps=overlaps)
    rows, width = residual.shape
    out = empty_bytes(rows, width, in_bytes, dtype, residual.device)
    _add_norm(residual, delta, inv_scale, epsilon, out, weight, None, overlaps)
    return out


def empty_bytes(rows: int, width: int, dtype: torch.dtype, compute_dtype: torch.dtype, device: torch.device) -> Bytes:
    """Room for activations in 8 bits."""
    values = torch.empty(rows, width, dtype=dtype, device=device)
    return Bytes(values, torch.empty(rows, dtype=torch.float32, device=device), compute_dtype)


def _add_norm(
    residual: Tensor,
    delta: Tensor | Sums | None,
    inv_scale: float,
    epsilon: float,
    out: Activations,
    weight: Tensor | None,
    watch: Watch | None,
    overlaps: bool,
    factor: float = 1.0,
) -> None:
    rows, width = residual.shape
    sums = delta if isinstance(delta, Sums) else None
    addend = delta.values if isinstance(delta, Sums) else delta
    block = triton.next_power_of_2(width)
    # For an absent tensor another is passed; the kernel is compiled without the code that would read it.
    kernels.add_norm[(rows,)](
        residual,
        residual if addend is None else addend,
        residual if weight is None else weight,
        out.raw if isinstance(out, Bytes) else out,
        residual if watch is None else watch.finite,
        residual if watch is None else watch.count,
        residual if sums is None else sums.row_scales,
        residual if sums is None else sums.column_scales,
        out.scales if isinstance(out, Bytes) else residual,
        epsilon,
        inv_scale,
        factor,
        width=width,
        block=block,
        parts=0 if addend is None else 1 if addend.ndim == 2 else len(addend),
        has_weight=weight is not None,
        watches=watch is not None,
        has_scales=sums is not None,
        gives_bytes=isinstance(out, Bytes),
        num_warps=norm_warps(block),
        **overlapping(overlaps),
    )


def overlapping(overlaps: bool) -> dict[str, bool]:
    """The arguments of a launch that does, or does not, overlap with others."""
    return {"overlaps": True, "launch_pdl": True} if overlaps else {"overlaps": False}


def norm_warps(block: int) -> int:
    """Warps of a norm kernel whose rows are computed as ``block`` numbers."""
    return min(max(block // 256, 4), 16)


def gate(joined: Tensor, activation: Activation, is_gated: bool, overlaps: bool = False, factor: float = 1.0) -> Tensor:
    """act(factor · gate) · up of [tokens, 2 · d_ff], gate first, or act(factor · x) of [tokens, d_ff].

    The result is [tokens, d_ff] in the same dtype.
    """
    rows, width = joined.shape[0], joined.shape[1] // (2 if is_gated else 1)
    out = joined.new_empty(rows, width)
    block = min(_GATE_BLOCK, triton.next_power_of_2(width))
    grid = (rows, triton.cdiv(width, block))
    constants = {"width": width, "activation": activation, "is_gated": is_gated, "block": block, "num_warps": 4}
    kernels.gate[grid](joined, out, factor, **constants, **overlapping(overlaps))
    return out
