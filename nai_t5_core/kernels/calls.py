"""The kernels as functions of tensors. All are for inference: nothing is recorded for gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.config import Activation
from nai_t5_core.kernels.build import library


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("columns", ctypes.c_long),
        ("depth", ctypes.c_long),
        ("format", ctypes.c_int),
        ("is_gated", ctypes.c_int),
        ("kind", ctypes.c_int),
    )


class _BlockWeights(ctypes.Structure):
    _fields_ = (
        ("qkv", _Matrix),
        ("o", _Matrix),
        ("inner", _Matrix),
        ("wo", _Matrix),
        ("heads", ctypes.c_long),
        ("epsilon", ctypes.c_float),
        ("activation", ctypes.c_int),
    )


class _Bias(ctypes.Structure):
    _fields_ = (
        ("documents", ctypes.c_void_p),
        ("count", ctypes.c_long),
        ("table", ctypes.c_void_p),
        ("table_reach", ctypes.c_long),
        ("scale", ctypes.c_float),
    )


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
# What kernels.h declares.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "t5_panel_steps": (_LONG, [_POINTER]),
    "t5_pack": (None, [_POINTER, _POINTER]),
    "t5_unpack": (None, [_POINTER, _POINTER]),
    "t5_normed_product": (_INT, [_POINTER, _LONG, _POINTER, _FLOAT, _POINTER, _INT, _POINTER]),
    "t5_added_product": (_INT, [_POINTER, _LONG, _POINTER, _POINTER]),
    "t5_attention": (_INT, [_POINTER, _LONG, _LONG, _POINTER, _INT, _POINTER]),
    "t5_block": (_INT, [_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER]),
    "t5_multiply_in_registers": (_LONG, [_INT, _LONG]),
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
        matrix = self.matrix()
        panels = torch.empty(_kernels().t5_panel_steps(ctypes.byref(matrix)), dtype=torch.int32)
        _kernels().t5_pack(ctypes.byref(matrix), panels.data_ptr())
        return replace(self, values=panels, format=_PANELS)

    def unpacked(self) -> Tensor:
        """[columns, depth]; panels give it in ``dtype``, or in int8."""
        if self.format != _PANELS:
            return self.values
        weight = torch.empty(self.columns, self.depth, dtype=self.dtype if self.scales is None else torch.int8)
        _kernels().t5_unpack(ctypes.byref(self.matrix()), weight.data_ptr())
        return weight

    def check_packing(self) -> None:
        """Raises ValueError where this can only be computed once it is packed."""
        if self.scales is not None and self.format != _PANELS:
            raise ValueError("a weight in int8 must be packed before it is used: call packed()")

    def matrix(self) -> _Matrix:
        """What the kernels are told; it is of no use once the tensors are gone."""
        kind = COMPUTE_DTYPES.index(self.dtype) + (0 if self.scales is None else len(COMPUTE_DTYPES))
        scales = None if self.scales is None else self.scales.data_ptr()
        return _Matrix(self.values.data_ptr(), scales, self.columns, self.depth, self.format, self.is_gated, kind)


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
            ctypes.byref(weight.matrix()),
            ACTIVATION_NUMBERS[activation],
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
        matrix = weight.matrix()
        _refuse(_kernels().t5_added_product(x.data_ptr(), tokens, ctypes.byref(matrix), residual.data_ptr()))


def attention(projected: Tensor, heads: int, documents: Tensor, table: Tensor, scale: float) -> Tensor:
    """softmax(q · kᵀ · scale + bias) · v in every document: [tokens, heads · d_kv] in the dtype of ``projected``.

    Args:
        projected: [tokens, 3 · heads · d_kv] in bfloat16 or float32: queries, keys and values, d_kv being even.
        documents: [documents, 4] int64: first row, rows, first key relative to the first row, keys (at least one). The
            keys are rows of their document.
        table: the bias by distance, [heads, distances] in float32.
    """
    tokens, width = projected.shape
    in_float32 = projected.dtype == torch.float32
    _check(projected, torch.float32 if in_float32 else torch.bfloat16, tokens, width)
    bias = _bias(documents, table, heads, scale)
    _count_attention(documents, width // 3)
    out = torch.empty(tokens, width // 3, dtype=projected.dtype)
    if len(documents):
        size = width // 3 // heads
        call = _kernels().t5_attention
        _refuse(call(projected.data_ptr(), heads, size, ctypes.byref(bias), in_float32, out.data_ptr()))
    return out


def encode_block(
    residual: Tensor,
    weights: Sequence[KernelWeight],
    norms: tuple[Tensor | None, Tensor | None],
    heads: int,
    epsilon: float,
    activation: Activation,
    documents: Tensor,
    table: Tensor,
    scale: float,
) -> None:
    """A layer of the encoder on the residual [tokens, d_model], float32, in place.

    The same, bit for bit, as :func:`normed_product`, :func:`attention`, :func:`add_product`, :func:`normed_product` and
    :func:`add_product`.

    Args:
        weights: of qkv [3 · heads · d_kv, d_model], o [d_model, heads · d_kv], the feed-forward's first, gated or not,
            [d_ff or 2 · d_ff, d_model], and wo [d_model, d_ff]; activations are kept in their ``dtype``.
        norms: the weights of attention's and the feed-forward's, [d_model] in float32; None for ones.
        documents, table, scale: as for :func:`attention`.

    Raises:
        ValueError: weights that do not fit each other, or are in int8 and not packed; a tensor of another shape or
            dtype.
        MemoryError: there is no memory for the activations.
    """
    tokens = len(residual)
    for weight in weights:
        weight.check_packing()
        _count(2 * tokens * weight.columns * weight.depth)
    _check_block(residual, weights, heads)
    bias = _bias(documents, table, heads, scale)
    qkv, o, _, wo = weights
    _count_attention(documents, o.depth)
    if tokens:
        block = _BlockWeights(*(weight.matrix() for weight in weights), heads, epsilon, ACTIVATION_NUMBERS[activation])
        norm_places = [None if norm is None else norm.data_ptr() for norm in norms]
        wide = torch.empty(tokens, max(qkv.columns, wo.depth), dtype=qkv.dtype)
        attended = torch.empty(tokens, o.depth, dtype=qkv.dtype)
        status = _kernels().t5_block(
            ctypes.byref(block),
            residual.data_ptr(),
            tokens,
            *norm_places,
            ctypes.byref(bias),
            wide.data_ptr(),
            attended.data_ptr(),
        )
        _refuse(status)


def multiply_in_registers(dtype: torch.dtype, rounds: int) -> int:
    """The instruction that products in ``dtype`` are made of, on all threads and on nothing but registers.

    Nothing is computed: the operations that are returned, divided by the time of the call, are a rate which no product
    on this processor can exceed. A round takes some nanoseconds.

    Args:
        dtype: bfloat16, float32 or int8.

    Raises:
        ValueError: another dtype.
    """
    kinds = (*COMPUTE_DTYPES, torch.int8)
    if dtype not in kinds:
        raise ValueError(f"the kernels multiply in {', '.join(map(str, kinds))}, and not in {dtype}")
    operations: int = _kernels().t5_multiply_in_registers(kinds.index(dtype), rounds)
    return operations


def _check_block(residual: Tensor, weights: Sequence[KernelWeight], heads: int) -> None:
    _, o, inner, wo = weights
    width, attended, hidden = wo.columns, o.depth, wo.depth
    _check(residual, torch.float32, len(residual), width)
    fitting = [
        (3 * attended, width),
        (width, attended),
        (hidden * (2 if inner.is_gated else 1), width),
        (width, hidden),
    ]
    shapes = [(weight.columns, weight.depth) for weight in weights]
    if shapes != fitting or attended % heads:
        raise ValueError(f"the weights of a block with {heads} heads do not fit each other; they are {shapes}")


def _bias(documents: Tensor, table: Tensor, heads: int, scale: float) -> _Bias:
    _check(table, torch.float32, heads, table.shape[1])
    return _Bias(documents.data_ptr(), len(documents), table.data_ptr(), table.shape[1] // 2, scale)


def _count_attention(documents: Tensor, width: int) -> None:
    if _COUNTING:
        _count(4 * width * int((documents[:, 1] * documents[:, 3]).sum()))


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
