"""The kernels as functions of tensors. All are for inference: nothing is recorded for gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from nai_t5_core.backends.kernels.addresses import address, address_if_any, sizes
from nai_t5_core.backends.kernels.interface import Bias, BlockWeights, Matrix, kernels
from nai_t5_core.facts.config import Activation

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
_FORMAT_DTYPES = {number: dtype for dtype, number in [*WEIGHT_FORMATS.items(), *_WITH_SCALES.items()]}

# A Status of tiles.h.
_WRONG_DOCUMENTS = 2

# What the kernels compute in, besides bytes, and what activations are stored in.
COMPUTE_DTYPES = (torch.bfloat16, torch.float32)


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
        columns, depth = sizes(weight)
        formats, unit = (WEIGHT_FORMATS, 2) if scales is None else (_WITH_SCALES, 4)
        is_even = depth % unit == 0 and not (is_gated and columns % 2)
        if weight.dtype not in formats or not weight.is_contiguous() or not is_even or not weight.numel():
            raise ValueError(
                "the kernels take contiguous weights of even sizes, not 0, in bfloat16, float16, float32 or float8, or "
                f"in int8 with scales and a depth that is a multiple of 4; got {weight.dtype} {list(weight.shape)}"
            )
        own_scales = None if scales is None else scales.detach().float().contiguous()
        made = cls(weight.detach(), formats[weight.dtype], columns, depth, dtype, is_gated, own_scales)
        made.matrix()  # refuses what is left to refuse
        return made

    @property
    def is_in_panels(self) -> bool:
        return self.format == _PANELS

    def in_panels(self) -> KernelWeight:
        """A copy in panels; itself where it is in panels already."""
        if self.is_in_panels:
            return self
        matrix = self.matrix()
        steps = self._panel_steps
        panels = torch.empty(steps, dtype=torch.int32)
        kernels().t5_to_panels(ctypes.byref(matrix), address(panels, torch.int32, steps))
        return replace(self, values=panels, format=_PANELS)

    def original(self) -> Tensor:
        """[columns, depth]; panels give it in ``dtype``, or in int8."""
        if not self.is_in_panels:
            return self.values
        dtype = self.dtype if self.scales is None else torch.int8
        weight = torch.empty(self.columns, self.depth, dtype=dtype)
        kernels().t5_from_panels(ctypes.byref(self.matrix()), address(weight, dtype, self.columns, self.depth))
        return weight

    def check_form(self) -> None:
        """Raises ValueError where this can only be computed from panels."""
        if self.scales is not None and not self.is_in_panels:
            raise ValueError("a weight in int8 must be in panels before it is used: call in_panels()")

    def matrix(self) -> Matrix:
        """What the kernels are told; it is of no use once the tensors are gone.

        Raises:
            ValueError: the tensors are not, or no longer, what they are to be.
        """
        matrix = self._sizes()
        matrix.scales = address_if_any(self.scales, torch.float32, self.columns)
        if self.is_in_panels:
            matrix.values = address(self.values, torch.int32, self._panel_steps)
        else:
            dtype = _FORMAT_DTYPES[self.format]
            matrix.values = address(self.values, dtype, self.columns, self.depth, anywhere=True)
        return matrix

    def _sizes(self) -> Matrix:
        kind = COMPUTE_DTYPES.index(self.dtype) + (0 if self.scales is None else len(COMPUTE_DTYPES))
        return Matrix(None, None, self.columns, self.depth, self.format, self.is_gated, kind)

    @cached_property
    def _panel_steps(self) -> int:
        steps: int = kernels().t5_panel_steps(ctypes.byref(self._sizes()))
        return steps


def normed_product(
    residual: Tensor, norm: Tensor | None, epsilon: float, weight: KernelWeight, activation: Activation | None = None
) -> Tensor:
    """act(norm(residual) · weightᵀ), of a gated weight act(norm(residual) · gateᵀ) · (norm(residual) · upᵀ).

    Args:
        residual: [tokens, depth], float32.
        norm: the weight of the RMS norm, [depth], float32; None for ones.

    Returns:
        [tokens, columns], or [tokens, columns / 2] of a gated weight, in the weight's ``dtype``, rounded once.

    Raises:
        ValueError: a tensor of another shape or dtype, an activation that the kernels do not know, or a weight in int8
            that is not in panels.
        MemoryError: there is no memory for the activations.
    """
    tokens, width = sizes(residual)[0], weight.columns // (2 if weight.is_gated else 1)
    weight.check_form()
    out = torch.empty(tokens, width, dtype=weight.dtype)
    arguments = (
        address(residual, torch.float32, tokens, weight.depth),
        tokens,
        address_if_any(norm, torch.float32, weight.depth),
        epsilon,
        ctypes.byref(weight.matrix()),
        _activation_number(activation),
        address(out, weight.dtype, tokens, width),
    )
    _count(2 * tokens * weight.columns * weight.depth)
    if tokens:
        _refuse(kernels().t5_normed_product(*arguments))
    return out


def add_product(x: Tensor, weight: KernelWeight, residual: Tensor) -> None:
    """residual += x · weightᵀ, in float32: [tokens, depth] in the weight's ``dtype`` to float32 [tokens, columns].

    Raises:
        ValueError: a tensor of another shape or dtype, or a weight that is gated, or in int8 and not in panels.
        MemoryError: there is no memory for the activations.
    """
    tokens, _ = sizes(x)
    weight.check_form()
    if weight.is_gated:
        raise ValueError("what is added to the residual is the product of a weight without a gate; this one is gated")
    arguments = (
        address(x, weight.dtype, tokens, weight.depth),
        tokens,
        ctypes.byref(weight.matrix()),
        address(residual, torch.float32, tokens, weight.columns),
    )
    _count(2 * tokens * weight.columns * weight.depth)
    if tokens:
        _refuse(kernels().t5_added_product(*arguments))


def attention(projected: Tensor, heads: int, documents: Tensor, table: Tensor, scale: float) -> Tensor:
    """softmax(q · kᵀ · scale + bias) · v in every document: [tokens, heads · d_kv] in the dtype of ``projected``.

    Args:
        projected: [tokens, 3 · heads · d_kv] in bfloat16 or float32: queries, keys and values, d_kv being even.
        documents: [documents, 4] int64: first row, rows, first key relative to the first row, keys (at least one). They
            are one behind the other and take all rows; the keys are rows of their document.
        table: the bias by distance, [heads, distances] in float32; the number of distances is odd.

    Raises:
        ValueError: a tensor of another shape or dtype, no head, or documents that are not as they are to be.
        MemoryError: there is no memory for the activations.
    """
    tokens, width = sizes(projected)
    size, rest = divmod(width, 3 * _checked_heads(heads))
    if rest or size % 2:
        raise ValueError(f"queries, keys and values of {heads} heads of an even size are expected; got {width} columns")
    dtype = torch.float32 if projected.dtype == torch.float32 else torch.bfloat16
    out = torch.empty(tokens, width // 3, dtype=dtype)
    arguments = (
        address(projected, dtype, tokens, width),
        tokens,
        heads,
        size,
        ctypes.byref(_bias(documents, table, heads, scale)),
        dtype == torch.float32,
        address(out, dtype, tokens, width // 3),
    )
    _count_attention(documents, width // 3)
    if tokens or len(documents):
        _refuse(kernels().t5_attention(*arguments))
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
        ValueError: weights that do not fit each other, or are in int8 and not in panels; a tensor of another shape or
            dtype, or documents that are not as they are to be. The residual is as it was then.
        MemoryError: there is no memory for the activations.
    """
    tokens, _ = sizes(residual)
    for weight in weights:
        weight.check_form()
    _check_block(weights, _checked_heads(heads))
    qkv, o, _, wo = weights
    dtype, width, wide_columns = qkv.dtype, wo.columns, max(qkv.columns, wo.depth)
    numbers = (heads, epsilon, _activation_number(activation))
    wide = torch.empty(tokens, wide_columns, dtype=dtype)
    attended = torch.empty(tokens, o.depth, dtype=dtype)
    arguments = (
        ctypes.byref(BlockWeights(*(weight.matrix() for weight in weights), *numbers)),
        address(residual, torch.float32, tokens, width),
        tokens,
        *(address_if_any(norm, torch.float32, width) for norm in norms),
        ctypes.byref(_bias(documents, table, heads, scale)),
        address(wide, dtype, tokens, wide_columns),
        address(attended, dtype, tokens, o.depth),
    )
    for weight in weights:
        _count(2 * tokens * weight.columns * weight.depth)
    _count_attention(documents, o.depth)
    if tokens or len(documents):
        _refuse(kernels().t5_block(*arguments))


def multiply_in_registers(dtype: torch.dtype, rounds: int) -> int:
    """The instruction that products in ``dtype`` are made of, on all threads and on nothing but registers.

    Nothing is computed: the operations that are returned, divided by the time of the call, are a rate which no product
    on this processor can exceed. A round takes some nanoseconds.

    Args:
        dtype: bfloat16, float32 or int8.

    Raises:
        ValueError: another dtype, or no round.
    """
    kinds = (*COMPUTE_DTYPES, torch.int8)
    if dtype not in kinds:
        raise ValueError(f"the kernels multiply in {', '.join(map(str, kinds))}, and not in {dtype}")
    if rounds < 1:
        raise ValueError(f"rounds={rounds}; there must be at least one")
    operations: int = kernels().t5_multiply_in_registers(kinds.index(dtype), rounds)
    return operations


def _check_block(weights: Sequence[KernelWeight], heads: int) -> None:
    qkv, o, inner, wo = weights
    width, attended, hidden = wo.columns, o.depth, wo.depth
    fitting = [
        (3 * attended, width),
        (width, attended),
        (hidden * (2 if inner.is_gated else 1), width),
        (width, hidden),
    ]
    shapes = [(weight.columns, weight.depth) for weight in weights]
    if shapes != fitting or attended % (2 * heads):
        raise ValueError(f"the weights of a block with {heads} heads do not fit each other; they are {shapes}")
    if any(weight.is_gated for weight in (qkv, o, wo)) or len({weight.dtype for weight in weights}) > 1:
        raise ValueError("of a block's weights the feed-forward's first alone may be gated, and all have one dtype")


def _bias(documents: Tensor, table: Tensor, heads: int, scale: float) -> Bias:
    count, distances = sizes(documents)[0], sizes(table)[1]
    if distances % 2 == 0:
        raise ValueError(f"the bias table has {distances} distances; their number is odd, from −reach to reach")
    return Bias(
        address(documents, torch.int64, count, 4),
        count,
        address(table, torch.float32, heads, distances),
        distances // 2,
        scale,
    )


def _checked_heads(heads: int) -> int:
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads={heads!r}; there must be a whole number of them, at least one")
    return heads


def _activation_number(activation: Activation | None) -> int:
    if activation not in ACTIVATION_NUMBERS:
        known = ", ".join(map(str, ACTIVATION_NUMBERS))
        raise ValueError(f"the kernels do not know the activation {activation!r}; they know {known}")
    return ACTIVATION_NUMBERS[activation]


def _count_attention(documents: Tensor, width: int) -> None:
    if _COUNTING:
        _count(4 * width * int((documents[:, 1] * documents[:, 3]).sum()))


def _refuse(status: int) -> None:
    if status == _WRONG_DOCUMENTS:
        raise ValueError(
            "documents must be one behind the other and take all rows, each with at least one key, and keys that are "
            "rows of its own"
        )
    if status:
        raise MemoryError("there is no memory left for the T5's activations; encode fewer or shorter prompts at a time")
