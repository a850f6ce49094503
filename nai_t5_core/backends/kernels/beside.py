"""Scales that lie beside the numbers of a weight, one for each so many of a column, as the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nai_t5_core.backends.kernels.addresses import address, address_if_any
from nai_t5_core.backends.kernels.interface import Beside

# Columns and scales of a tile, which those that lie in tiles are filled up to.
_TILE = (128, 4)


@dataclass(frozen=True)
class BesideFormat:
    """Numbers in kernels.h whose scales lie beside them.

    Attributes:
        format: its number there.
        values: the dtype of what holds the numbers.
        in_one: how many numbers one of these holds.
        scales: the dtype of the scales.
        in_tiles: whether these lie in tiles, and not row by row.
        may_end: whether the last scale of a column may be for fewer numbers.
    """

    format: int
    values: torch.dtype
    in_one: int
    scales: torch.dtype
    in_tiles: bool = False
    may_end: bool = False


BESIDE_FORMATS = {
    "4 bits": BesideFormat(18, torch.uint8, 2, torch.float32),
    "4 bits, nested": BesideFormat(19, torch.uint8, 2, torch.uint8),
    "NVFP4": BesideFormat(20, torch.uint8, 2, torch.uint8, in_tiles=True),
    "MXFP8": BesideFormat(21, torch.float8_e4m3fn, 1, torch.uint8, in_tiles=True),
    "float8_e4m3fn in blocks": BesideFormat(22, torch.float8_e4m3fn, 1, torch.float32, may_end=True),
    "float8_e5m2 in blocks": BesideFormat(23, torch.float8_e5m2, 1, torch.float32, may_end=True),
}


@dataclass(frozen=True)
class NestedScales:
    """What makes float32 scales of bytes: the value that a byte numbers, times an outer scale, plus an offset.

    Attributes:
        codes: [256] float32.
        outer: float32, one for each ``block`` bytes in the order in which they lie.
        block: a power of two.
    """

    codes: Tensor
    outer: Tensor
    block: int
    offset: float


@dataclass(frozen=True)
class ScalesBeside:
    """Scales for so many numbers of so many columns each, both powers of two.

    Attributes:
        format: a name of :data:`BESIDE_FORMATS`.
        scales: as they lie, contiguous: [places down, places across], in tiles filled up.
        across: for how many numbers of a column one is, 16 or more.
        down: for how many columns.
        table: what 4 bits number, [16] float32.
        nested: what makes scales of bytes, of ``"4 bits, nested"``.
    """

    format: str
    scales: Tensor
    across: int
    down: int = 1
    table: Tensor | None = None
    nested: NestedScales | None = None

    @property
    def known(self) -> BesideFormat:
        return BESIDE_FORMATS[self.format]

    def values_shape(self, columns: int, depth: int) -> tuple[int, int]:
        """That of what holds the numbers.

        Raises:
            ValueError: a scale is for less than 16 numbers, or for no power of two of numbers or columns; or one of
                4 bits, or in tiles, would be for fewer numbers at the end of a column.
        """
        if not may_share(self.across) or not is_power_of_two(self.down):
            raise ValueError(
                f"a scale is for 16 numbers or more and for powers of two; got {self.across} of {self.down} columns"
            )
        if not self.known.may_end and depth % self.across:
            raise ValueError(
                f"a depth of {depth} does not divide by {self.across}, which a scale of {self.format} is for"
            )
        return columns, depth // self.known.in_one

    def described(self, columns: int, depth: int) -> Beside:
        """What the kernels are told; it is of no use once the tensors are gone.

        Raises:
            ValueError: a tensor is not what it is to be.
        """
        known, nested = self.known, self.nested
        down, across = -(-columns // self.down), -(-depth // self.across)
        if known.in_tiles:
            down, across = (-(-count // unit) * unit for count, unit in zip((down, across), _TILE, strict=True))
        if (self.table is None) != (known.in_one == 1) or (nested is None) != (self.format != "4 bits, nested"):
            raise ValueError(f"{self.format} has not the tables that it needs, or others")
        if nested is not None and not is_power_of_two(nested.block):
            raise ValueError(f"outer scales are for powers of two; got {nested.block}")
        return Beside(
            address(self.scales, known.scales, down, across, anywhere=True),
            address_if_any(self.table, torch.float32, 16),
            None if nested is None else address(nested.codes, torch.float32, 256),
            None if nested is None else address(nested.outer, torch.float32, -(-down * across // nested.block)),
            across,
            0.0 if nested is None else nested.offset,
            _bits(self.across),
            _bits(self.down),
            0 if nested is None else _bits(nested.block),
        )


def may_share(numbers: int) -> bool:
    """Whether a scale may be for so many numbers of a column."""
    return numbers >= 16 and is_power_of_two(numbers)


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _bits(power_of_two: int) -> int:
    return power_of_two.bit_length() - 1
