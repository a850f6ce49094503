"""Products with weights in 8 bits: of up to 128 rows by our own kernel, of more by torch, from an unpacked weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from nai_t5_core.backends.cuda.activations import Bytes, Sums
from nai_t5_core.backends.cuda.byte_kinds import BLOCK
from nai_t5_core.backends.cuda.byte_product_kernel import multiply_bytes, unpack_bytes
from nai_t5_core.backends.cuda.byte_weight import ByteWeight, RowScaled, Weight
from nai_t5_core.backends.cuda.card import Card
from nai_t5_core.backends.cuda.launches import gate
from nai_t5_core.backends.cuda.products import (
    MOST_ROWS,
    Configuration,
    Configurations,
    Kind,
    block_rows,
    constants_of,
    empty_product,
    grid_of,
)
from nai_t5_core.backends.cuda.torch_products import Products
from nai_t5_core.facts.config import Activation

# Numbers that are unpacked at a time: at most 42 MB, in memory that the next ones take over. So a T5-XXL stays below
# 5 GB, and a product of 4096 columns still fills a card.
_MOST_UNPACKED = 20 << 20
_KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "float8_e4m3", torch.float8_e5m2: "float8_e5m2"}

# For sizes that no other configuration fits; blocks of scales need 32 numbers.
_SMALL = (Configuration(16, 32, 1, 2), Configuration(16, 16, 1, 2))
_WIDE = (Configuration(64, 64, stages=3), Configuration(32, 64, stages=3), *_SMALL)

# Estimates, not measured. All of them fit into the shared memory of consumer cards.
ESTIMATED_FOR_BYTES: Configurations = {
    **{("plain", rows): (Configuration(64, 128), Configuration(32, 64), *_SMALL) for rows in (16, 32, 64)},
    **{("gated", rows): (Configuration(64, 64), Configuration(32, 32), *_SMALL) for rows in (16, 32, 64)},
    **{
        ("summed", rows): (*(Configuration(64, 128, parts) for parts in (4, 2, 1)), Configuration(64, 64), *_SMALL)
        for rows in (16, 32, 64)
    },
    ("plain", 128): _WIDE,
    ("gated", 128): (Configuration(64, 64, stages=3, warps=8), Configuration(32, 64, stages=3), *_SMALL),
    ("summed", 128): (*(Configuration(64, 64, parts, stages=3) for parts in (4, 2, 1)), *_SMALL),
}

# Measured on an H200 with the products of a T5-XXL from int8, of 16, 64 and 128 rows. Every program reads all inputs of
# its part of the depth: 64 rows are twice as many bytes as 64 columns of a weight in 8 bits, so that from there on
# columns are 128 where that leaves enough programs.
_NARROW = Configuration(32, 128, warps=2)
_BROAD = Configuration(128, 128, warps=8)
_BROAD_WIDE = Configuration(128, 128, stages=3, warps=8)
_FOR_HOPPER: Configurations = {
    **{(kind, rows): (_NARROW,) for kind in ("plain", "gated") for rows in (16, 32)},
    ("plain", 64): (_BROAD,),
    ("gated", 64): (Configuration(64, 128, stages=3),),
    ("plain", 128): (_BROAD_WIDE,),
    ("gated", 128): (_BROAD_WIDE,),
    ("summed", 128): (Configuration(64, 128, 4, stages=3),),
}
HOPPER_FOR_BYTES: Configurations = {
    key: (*_FOR_HOPPER.get(key, ()), *estimated) for key, estimated in ESTIMATED_FOR_BYTES.items()
}


def byte_configurations_on(card: Card | None) -> Configurations:
    """The configurations of our kernel for weights in 8 bits on a card; None stands for the interpreter."""
    return HOPPER_FOR_BYTES if card is not None and card.capability == (9, 0) else ESTIMATED_FOR_BYTES


class ByteProducts:
    """Products with weights in 8 bits; those with other weights are left to ``others``.

    Args:
        others: computes products with weights in the dtype of their inputs.
        configurations: of our kernel, to choose from for each kind of product; none: torch computes all.
        converts_float8: whether the card has instructions for float8 (compute capability 8.9 and later).
        has_overlaps: whether launches overlap where those of ``others`` do. By default they do not: on an H200 layers
            of 64 tokens in int8 took longer than their products and norms alone.
    """

    def __init__(
        self,
        others: Products,
        configurations: Configurations | None,
        converts_float8: bool,
        has_overlaps: bool = False,
    ) -> None:
        self.others, self.configurations, self.converts_float8 = others, configurations, converts_float8
        self.has_overlaps = has_overlaps

    def overlaps(self, rows: int, in_bytes: bool, inputs_in_bytes: bool = False) -> bool:
        return self.others.overlaps(rows, in_bytes) and (self.has_overlaps or not in_bytes)

    def input_bytes(self, weights: RowScaled | None, rows: int) -> torch.dtype | None:
        return None

    def plain(self, x: Any, weight: Weight) -> Tensor:
        if isinstance(weight, Tensor):
            return self.others.plain(x, weight)
        chosen = self._chosen("plain", x, weight, weight.shape[0])
        if chosen is None:
            return self._by_torch(x, weight)
        return self._product(x, weight, chosen, x.dtype)[0]

    def activated(self, x: Any, weight: Weight, activation: Activation, is_gated: bool) -> Tensor | Bytes:
        if isinstance(weight, Tensor):
            return self.others.activated(x, weight, activation, is_gated)
        columns = weight.shape[0] // (2 if is_gated else 1)
        chosen = self._chosen("gated" if is_gated else "plain", x, weight, columns)
        if chosen is None:
            return gate(self._by_torch(x, weight), activation, is_gated, self.overlaps(len(x), True))
        return self._product(x, weight, chosen, x.dtype, activation, is_gated)[0]

    def summed(self, x: Any, weight: Weight) -> Tensor | Sums:
        if isinstance(weight, Tensor):
            return self.others.summed(x, weight)
        chosen = self._chosen("summed", x, weight, weight.shape[0])
        if chosen is None:
            return self._by_torch(x, weight)
        return self._product(x, weight, chosen, torch.float32)

    def _chosen(self, kind: Kind, x: Tensor, weight: ByteWeight, columns: int) -> Configuration | None:
        """The first configuration that fits; None where none does, or there are more rows than the kernel takes."""
        if self.configurations is None or not 0 < len(x) <= MOST_ROWS:
            return None
        known = self.configurations[kind, block_rows(len(x))]
        return next((each for each in known if fits(each, weight, columns)), None)

    def _product(
        self,
        x: Tensor,
        weight: ByteWeight,
        configuration: Configuration,
        dtype: torch.dtype,
        activation: Activation | None = None,
        is_gated: bool = False,
    ) -> Tensor:
        how = (configuration, dtype, activation, is_gated, self.overlaps(len(x), True), self.converts_float8)
        return byte_product(x, weight, *how)

    def _by_torch(self, x: Tensor, weight: ByteWeight) -> Tensor:
        """[tokens, columns] in the dtype of x, of so many columns at a time that little is unpacked at once."""
        out = x.new_empty(len(x), weight.shape[0])
        for some in column_runs(weight):
            torch.mm(x, unpacked(weight, some, x.dtype, self.converts_float8).t(), out=out[:, some])
        return out


def fits(configuration: Configuration, weight: ByteWeight, columns: int) -> bool:
    """Whether blocks and parts divide a product, whose weight may have two rows for each of its columns."""
    has_whole_blocks = weight.block_scales is None or configuration.block_depth % BLOCK == 0
    return has_whole_blocks and configuration.fits(columns, weight.shape[1])


def byte_product(
    x: Tensor,
    weight: ByteWeight,
    configuration: Configuration,
    dtype: torch.dtype,
    activation: Activation | None = None,
    is_gated: bool = False,
    overlaps: bool = False,
    converts_float8: bool = False,
) -> Tensor:
    """As :func:`nai_t5_core.backends.cuda.products.product`, with a weight in 8 bits.

    Args:
        x: [rows, depth] in float16 or bfloat16, contiguous, of up to 128 rows; multiplied by the norm's weight already.
        converts_float8: whether the card has instructions for float8.

    Returns:
        [parts, rows, columns].

    Raises:
        ValueError: rows or a configuration that do not fit.
    """
    (rows, depth), columns = x.shape, weight.shape[0] // (2 if is_gated else 1)
    does_fit, is_one = fits(configuration, weight, columns), bool(activation or is_gated)
    out = empty_product((rows, columns, depth), configuration, does_fit, is_one, dtype, x.device)
    tensors, constants = byte_arguments(x, weight, out, configuration, activation, is_gated, overlaps, converts_float8)
    multiply_bytes[grid_of(out, configuration)](*tensors, **constants)
    return out


def byte_arguments(
    x: Tensor,
    weight: ByteWeight,
    out: Tensor,
    configuration: Configuration,
    activation: Activation | None = None,
    is_gated: bool = False,
    overlaps: bool = False,
    converts_float8: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The kernel's arguments for a :func:`byte_product`: those of the call, and the constants it is compiled for."""
    constants = constants_of(x, out, configuration, block_rows(len(x)), activation, is_gated, overlaps)
    constants |= {"kind": kind_of(weight, converts_float8), "has_blocks": weight.block_scales is not None}
    return (x, *_bytes_and_scales(weight), out, len(x)), constants


def kind_of(weight: ByteWeight, converts_float8: bool) -> str:
    """What the kernels call the bytes of a weight."""
    kind = _KINDS[weight.values.dtype]
    return f"{kind}, by bits" if kind == "float8_e4m3" and not converts_float8 else kind


def column_runs(weight: ByteWeight) -> Iterator[slice]:
    """Runs of columns of nearly one size, each of no more numbers than are unpacked at a time."""
    columns, depth = weight.shape
    runs = -(-columns // max(1, _MOST_UNPACKED // depth))
    step = -(-columns // runs)
    for first in range(0, columns, step):
        yield slice(first, min(first + step, columns))


def unpacked(weight: ByteWeight, columns: slice, dtype: torch.dtype, converts_float8: bool = False) -> Tensor:
    """Some columns of a weight in ``dtype``, without the norm's weight: [columns, depth]."""
    depth, count = weight.shape[1], columns.stop - columns.start
    out = torch.empty(count, depth, dtype=dtype, device=weight.values.device)
    values, scales, block_scales = _bytes_and_scales(weight)
    block_columns, block_depth = 8, 256
    grid = (triton.cdiv(depth, block_depth), triton.cdiv(count, block_columns))
    unpack_bytes[grid](
        values[columns],
        scales[columns],
        # Of the first column; the kernel goes on by whole rows.
        scales if weight.block_scales is None else block_scales[:, columns.start :],
        out,
        count,
        weight.shape[0],
        depth,
        kind=kind_of(weight, converts_float8),
        has_blocks=weight.block_scales is not None,
        block_columns=block_columns,
        block_depth=block_depth,
        num_warps=4,
    )
    return out


def _bytes_and_scales(weight: ByteWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes, scales of columns, and scales of blocks; for absent ones another tensor, which is not read."""
    values = weight.values if weight.values.dtype == torch.int8 else weight.values.view(torch.uint8)
    return values, weight.scales, weight.scales if weight.block_scales is None else weight.block_scales
