"""The kernels as functions of tensors. All are for inference: nothing is recorded for gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nai_t5_core.backends.kernels.addresses import address, address_if_any, sizes
from nai_t5_core.backends.kernels.interface import Bias, BlockWeights, kernels
from nai_t5_core.backends.kernels.sets import InstructionSet
from nai_t5_core.backends.kernels.weights import KernelWeight, or_best
from nai_t5_core.facts.config import Activation

# Numbers of the activations in tiles.h.
ACTIVATION_NUMBERS: dict[Activation | None, int] = {None: 0, "relu": 1, "gelu_new": 2, "silu": 3}

# A Status of memory.h.
_WRONG_DOCUMENTS = 2


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
    out = torch.empty(tokens, width, dtype=weight.dtype, device="cpu")
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
        _refuse(kernels(weight.instructions).t5_normed_product(*arguments))
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
        _refuse(kernels(weight.instructions).t5_added_product(*arguments))


def product(x: Tensor, weight: KernelWeight) -> Tensor:
    """x · weightᵀ: [tokens, depth] to [tokens, columns], both in the weight's ``dtype``, rounded once.

    Raises:
        ValueError: a tensor of another shape or dtype, or a weight that is gated, or in int8 and not in panels.
        MemoryError: there is no memory for the activations.
    """
    tokens, _ = sizes(x)
    weight.check_form()
    if weight.is_gated:
        raise ValueError("a product by itself is that of a weight without a gate; this one is gated")
    out = torch.empty(tokens, weight.columns, dtype=weight.dtype, device="cpu")
    arguments = (
        address(x, weight.dtype, tokens, weight.depth),
        tokens,
        ctypes.byref(weight.matrix()),
        address(out, weight.dtype, tokens, weight.columns),
    )
    _count(2 * tokens * weight.columns * weight.depth)
    if tokens:
        _refuse(kernels(weight.instructions).t5_product(*arguments))
    return out


def attention(
    projected: Tensor,
    heads: int,
    documents: Tensor,
    table: Tensor,
    scale: float,
    instructions: InstructionSet | None = None,
) -> Tensor:
    """softmax(q · kᵀ · scale + bias) · v in every document: [tokens, heads · d_kv] in the dtype of ``projected``.

    Args:
        projected: [tokens, 3 · heads · d_kv]: queries, keys and values, d_kv being even; in a dtype that the
            instruction set stores activations in.
        documents: [documents, 4] int64: first row, rows, first key relative to the first row, keys (at least one). They
            are one behind the other and take all rows; the keys are rows of their document.
        table: the bias by distance, [heads, distances] in float32; the number of distances is odd.
        instructions: what to compute with; by default the best that this processor has.

    Raises:
        ValueError: a tensor of another shape or dtype, no head, or documents that are not as they are to be.
        MemoryError: there is no memory for the activations.
    """
    tokens, width = sizes(projected)
    size, rest = divmod(width, 3 * _checked_heads(heads))
    if rest or size % 2:
        raise ValueError(f"queries, keys and values of {heads} heads of an even size are expected; got {width} columns")
    instructions = or_best(instructions)
    allowed = tuple(dict.fromkeys(instructions.stored.values()))
    dtype = projected.dtype if projected.dtype in allowed else allowed[0]
    out = torch.empty(tokens, width // 3, dtype=dtype, device="cpu")
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
        _refuse(kernels(instructions).t5_attention(*arguments))
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
    wide = torch.empty(tokens, wide_columns, dtype=dtype, device="cpu")
    attended = torch.empty(tokens, o.depth, dtype=dtype, device="cpu")
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
        _refuse(kernels(qkv.instructions).t5_block(*arguments))


def multiply_in_registers(dtype: torch.dtype, rounds: int, instructions: InstructionSet | None = None) -> int:
    """The instruction that products with weights in ``dtype`` are made of, on all threads and on registers only.

    Nothing is computed: the operations that are returned, divided by the time of the call, are a rate which no product
    on this processor can exceed. A round takes some nanoseconds.

    Args:
        dtype: of weights in panels, with what activations are stored in beside them.
        instructions: what to compute with; by default the best that this processor has.

    Raises:
        ValueError: another dtype, or no round.
    """
    instructions = or_best(instructions)
    kinds = {weight: number for (weight, _), number in instructions.kinds.items()}
    if dtype not in kinds:
        known = ", ".join(map(str, kinds))
        raise ValueError(f"the kernels for {instructions.title} multiply {known}, and not {dtype}")
    if rounds < 1:
        raise ValueError(f"rounds={rounds}; there must be at least one")
    operations: int = kernels(instructions).t5_multiply_in_registers(kinds[dtype], rounds)
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
    if (
        any(weight.is_gated for weight in (qkv, o, wo))
        or len({(each.dtype, each.instructions) for each in weights}) > 1
    ):
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
