"""The kernels as functions of tensors. All are for inference: nothing is recorded for gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.config import Activation
from nai_t5_core.kernels.build import library

# Numbers of the activations in tiles.h, and of the formats in products.cpp.
ACTIVATION_NUMBERS: dict[Activation | None, int] = {None: 0, "relu": 1, "gelu_new": 2, "silu": 3}
WEIGHT_FORMATS = {
    torch.bfloat16: 0,
    torch.float16: 1,
    torch.float32: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
}
_WITH_SCALES = {torch.int8: 5}
_PANELS = 6

# What the kernels compute in, besides bytes, and what activations are stored in.
COMPUTE_DTYPES = (torch.bfloat16, torch.float32)

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "t5_panel_steps": (_LONG, [_LONG, _LONG, _INT, _INT]),
    "t5_pack": (None, [_POINTER, _INT, _LONG, _LONG, _INT, _INT, _POINTER, _POINTER]),
    "t5_unpack": (None, [_POINTER, _LONG, _LONG, _INT, _INT, _POINTER]),
    "t5_normed_product": (
        _INT,
        [_POINTER, _LONG, _POINTER, _FLOAT, _POINTER, _INT, _LONG, _LONG, _INT, _INT, _INT, _POINTER],
    ),
    "t5_added_product": (_INT, [_POINTER, _LONG, _POINTER, _INT, _LONG, _LONG, _INT, _POINTER]),
    "t5_attention": (_INT, [_POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _LONG, _FLOAT, _INT, _POINTER]),
}


@lru_cache
def _kernels() -> ctypes.CDLL:
    kernels = library()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(kernels, name)
        function.restype, function.argtypes = result, arguments
    return kernels


@dataclass
class Counted:
    """Floating-point operations of products and attention."""

    flops: int = 0


_COUNTING: list[Counted] = []


@contextmanager
def counted() -> Iterator[Counted]:
    """Counts what the kernels execute meanwhile, which torch's own counters do not see."""
    counter = Counted()
    _COUNTING.append(counter)
    try:
        yield counter
    finally:
        _COUNTING.remove(counter)


def _count(flops: int) -> None:
    for counter in _COUNTING:
        counter.flops += flops


@dataclass(frozen=True)
class KernelWeight:
    """A weight as the kernels take it: [columns, depth] as it lies in memory, or a copy in panels.

    A gated weight has the columns of the gate and then those of up. ``dtype`` is that of the activations, in which
    products are computed; what is not in it is rounded to it in every call. Panels save that, and rearranging the
    weight. Weights in 8 bits have the ``scales`` of their columns; their products are computed in 8 bits, and from
    panels only.
    """

    values: Tensor
    format: int
    columns: int
    depth: int
    dtype: torch.dtype
    is_gated: bool = False
    scales: Tensor | None = None

    @classmethod
    def plain(
        cls, weight: Tensor, dtype: torch.dtype, is_gated: bool = False, scales: Tensor | None = None
    ) -> KernelWeight:
        """A contiguous weight [columns, depth] of even depth, and even in columns if it is gated.

        Args:
            weight: in a dtype of :data:`WEIGHT_FORMATS`; or int8, of a depth that is a multiple of 4.
            dtype: of the activations, bfloat16 or float32.
            scales: [columns] float32, of a weight in int8: what a unit is worth.
        """
        if dtype not in COMPUTE_DTYPES:
            raise ValueError(f"the kernels compute in bfloat16 or float32, and not in {dtype}")
        columns, depth = weight.shape
        formats, unit = (WEIGHT_FORMATS, 2) if scales is None else (_WITH_SCALES, 4)
        if weight.dtype not in formats or not weight.is_contiguous() or depth % unit or (is_gated and columns % 2):
            raise ValueError(
                "the kernels take contiguous weights of even sizes in bfloat16, float16, float32 or float8, or in int8 "
                f"with scales and a depth that is a multiple of 4; got {weight.dtype} {list(weight.shape)}"
            )
        own_scales = None if scales is None else scales.float().contiguous()
        return cls(weight.detach(), formats[weight.dtype], columns, depth, dtype, is_gated, own_scales)

    def packed(self) -> KernelWeight:
        """A copy in panels."""
        panels = torch.empty(_kernels().t5_panel_steps(*self._shape), dtype=torch.int32)
        scales = None if self.scales is None else self.scales.data_ptr()
        _kernels().t5_pack(self.values.data_ptr(), self.format, *self._shape, scales, panels.data_ptr())
        return replace(self, values=panels, format=_PANELS)

    def unpacked(self) -> Tensor:
        """[columns, depth]; panels give it in ``dtype``, or in int8."""
        if self.format != _PANELS:
            return self.values
        weight = torch.empty(self.columns, self.depth, dtype=self.dtype if self.scales is None else torch.int8)
        _kernels().t5_unpack(self.values.data_ptr(), *self._shape, weight.data_ptr())
        return weight

    def check_packing(self) -> None:
        """Raises ValueError where this can only be computed once it is packed."""
        if self.scales is not None and self.format != _PANELS:
            raise ValueError("a weight in int8 must be packed before it is used: call packed()")

    @property
    def kind(self) -> int:
        """The number of what is computed in, in products.cpp."""
        return COMPUTE_DTYPES.index(self.dtype) + (0 if self.scales is None else len(COMPUTE_DTYPES))

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return self.columns, self.depth, self.is_gated, self.kind


def normed_product(
    residual: Tensor, norm: Tensor | None, epsilon: float, weight: KernelWeight, activation: Activation | None = None
) -> Tensor:
    """act(norm(residual) · weightᵀ), of a gated weight act(norm(residual) · gateᵀ) · (norm(residual) · upᵀ).

    Args:
        residual: [tokens, depth], float32.
        norm: the weight of the RMS norm, [depth], float32; None for ones.

    Returns:
        [tokens, columns], or [tokens, columns / 2] of a gated weight, in the weight's ``dtype``, rounded once.
    """
    tokens = len(residual)
    weight.check_packing()
    _check(residual, torch.float32, tokens, weight.depth)
    _count(2 * tokens * weight.columns * weight.depth)
    out = torch.empty(tokens, weight.columns // (2 if weight.is_gated else 1), dtype=weight.dtype)
    if tokens:
        status = _kernels().t5_normed_product(
            residual.data_ptr(),
            tokens,
            None if norm is None else norm.data_ptr(),
            epsilon,
            weight.values.data_ptr(),
            weight.format,
            weight.columns,
            weight.depth,
            weight.is_gated,
            ACTIVATION_NUMBERS[activation],
            weight.kind,
            out.data_ptr(),
        )
        _refuse(status)
    return out


def add_product(x: Tensor, weight: KernelWeight, residual: Tensor) -> None:
    """residual += x · weightᵀ, in float32: [tokens, depth] in the weight's ``dtype`` to float32 [tokens, columns]."""
    tokens = len(x)
    weight.check_packing()
    _check(x, weight.dtype, tokens, weight.depth)
    _check(residual, torch.float32, tokens, weight.columns)
    _count(2 * tokens * weight.columns * weight.depth)
    if tokens:
        status = _kernels().t5_added_product(
            x.data_ptr(),
            tokens,
            weight.values.data_ptr(),
            weight.format,
            weight.columns,
            weight.depth,
            weight.kind,
            residual.data_ptr(),
        )
        _refuse(status)


def attention(projected: Tensor, heads: int, documents: Tensor, table: Tensor, scale: float) -> Tensor:
    """softmax(q · kᵀ · scale + bias) · v in every document: [tokens, heads · d_kv] in the dtype of ``projected``.

    Args:
        projected: [tokens, 3 · heads · d_kv] in bfloat16 or float32: queries, keys and values, d_kv being even.
        documents: [documents, 4] int64: first row, rows, first key relative to the first row, keys (at least one). The
            keys are rows of their document.
        table: the bias by distance, [heads, distances] in float32.
    """
    tokens, width = projected.shape
    _check(projected, torch.float32 if projected.dtype == torch.float32 else torch.bfloat16, tokens, width)
    _check(table, torch.float32, heads, table.shape[1])
    if _COUNTING:
        _count(4 * width // 3 * int((documents[:, 1] * documents[:, 3]).sum()))
    out = torch.empty(tokens, width // 3, dtype=projected.dtype)
    if len(documents):
        status = _kernels().t5_attention(
            projected.data_ptr(),
            heads,
            width // 3 // heads,
            documents.data_ptr(),
            len(documents),
            table.data_ptr(),
            table.shape[1] // 2,
            scale,
            projected.dtype == torch.float32,
            out.data_ptr(),
        )
        _refuse(status)
    return out


def _check(tensor: Tensor, dtype: torch.dtype, rows: int, columns: int) -> None:
    """What the kernels would read past, or misread, must not reach them."""
    if tensor.dtype != dtype or tensor.shape != (rows, columns) or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(
            f"expected a contiguous {dtype} tensor [{rows}, {columns}] on the CPU; got {tensor.dtype} "
            f"{list(tensor.shape)} on {tensor.device}"
        )


def _refuse(status: int) -> None:
    if status:
        raise MemoryError("there is no memory left for the T5's activations; encode fewer or shorter prompts at a time")
