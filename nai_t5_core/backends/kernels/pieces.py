"""Weights as they lie in memory, which the kernels read row by row: numbers, or bytes of a quantised file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nai_t5_core.backends.kernels.addresses import address, address_if_any
from nai_t5_core.backends.kernels.beside import ScalesBeside
from nai_t5_core.backends.kernels.interface import Beside, Piece

# Numbers of the formats in kernels.h.
WEIGHT_FORMATS = {
    torch.bfloat16: 0,
    torch.float16: 1,
    torch.float32: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
}
INT8_FORMAT = 5
# Sizes of the groups of int8 whose rotation they undo, see turned.h.
TURNED = (4, 16, 64, 256)
DTYPE_FORMATS = {**WEIGHT_FORMATS, torch.int8: INT8_FORMAT}


@dataclass(frozen=True)
class BlockFormat:
    """Blocks of numbers in kernels.h: its number there, and how many numbers stand in how many bytes."""

    format: int
    numbers: int
    bytes: int


# By their names in the package gguf.
BLOCK_FORMATS = {
    "Q8_0": BlockFormat(6, 32, 34),
    "Q4_0": BlockFormat(7, 32, 18),
    "Q4_1": BlockFormat(8, 32, 20),
    "Q5_0": BlockFormat(9, 32, 22),
    "Q5_1": BlockFormat(10, 32, 24),
    "IQ4_NL": BlockFormat(11, 32, 18),
    "Q2_K": BlockFormat(12, 256, 84),
    "Q3_K": BlockFormat(13, 256, 110),
    "Q4_K": BlockFormat(14, 256, 144),
    "Q5_K": BlockFormat(15, 256, 176),
    "Q6_K": BlockFormat(16, 256, 210),
    "IQ4_XS": BlockFormat(17, 256, 136),
}


@dataclass(frozen=True)
class WeightPiece:
    """Some columns of a weight: [columns, depth].

    Attributes:
        values: contiguous, in a dtype of :data:`DTYPE_FORMATS`; or of ``blocks``, bytes [columns, bytes of a row]; or
            those of ``beside``.
        columns, depth: how many there are, and the numbers of each.
        blocks: what the bytes are, a name of :data:`BLOCK_FORMATS`; None where ``values`` are numbers.
        scales: of the columns of numbers in a byte, [columns] float32.
        factors: what all columns are multiplied by, [depth] float32.
        unit: what numbers in int8 are multiplied by after their scales; of NVFP4 it is the scales that are.
        turned: the numbers of a group along the depth that was rotated before they were rounded to int8, one of
            :data:`TURNED`; 0 where none was.
        beside: scales of parts of columns, where they do not lie among the numbers.
    """

    values: Tensor
    columns: int
    depth: int
    blocks: str | None = None
    scales: Tensor | None = None
    factors: Tensor | None = None
    unit: float = 1.0
    turned: int = 0
    beside: ScalesBeside | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but numbers of a dtype."""
        others = (self.blocks, self.scales, self.factors, self.beside)
        return all(each is None for each in others) and self.unit == 1 and not self.turned

    @property
    def shape(self) -> tuple[int, ...]:
        """What that of the values must be.

        Raises:
            ValueError: the depth is no whole blocks.
        """
        if self.beside is not None:
            return self.beside.values_shape(self.columns, self.depth)
        if self.blocks is None:
            return self.columns, self.depth
        known = BLOCK_FORMATS[self.blocks]
        if self.depth % known.numbers:
            raise ValueError(
                f"{self.blocks} has blocks of {known.numbers} numbers, and a depth of {self.depth} is no whole blocks"
            )
        return self.columns, self.depth // known.numbers * known.bytes

    def described(self) -> Piece:
        """What the kernels are told; it is of no use once the tensors are gone.

        Raises:
            ValueError: a tensor is not, or no longer, what it is to be.
        """
        number, dtype = self._format()
        has_own = self.blocks is not None or self.beside is not None
        if self.scales is not None and (has_own or dtype.itemsize > 1):
            raise ValueError("scales of columns are for numbers of a byte, and not for blocks or numbers in more bits")
        if self.turned:
            self._check_turned(dtype)
        return Piece(
            address(self.values, dtype, *self.shape, anywhere=True),
            address_if_any(self.scales, torch.float32, self.columns),
            address_if_any(self.factors, torch.float32, self.depth),
            self.columns,
            self.unit,
            number,
            self.turned,
            Beside() if self.beside is None else self.beside.described(self.columns, self.depth),
        )

    def _check_turned(self, dtype: torch.dtype) -> None:
        if dtype != torch.int8 or self.unit != 1:
            raise ValueError("only numbers in int8 without a unit can have been rotated")
        if self.turned not in TURNED or self.depth % self.turned:
            raise ValueError(
                f"a rotation is undone in groups of {', '.join(map(str, TURNED))} numbers that the depth divides by; "
                f"got {self.turned}, with a depth of {self.depth}"
            )

    def _format(self) -> tuple[int, torch.dtype]:
        """Its number in kernels.h, and the dtype of the values."""
        if self.beside is not None:
            return self.beside.known.format, self.beside.known.values
        if self.blocks is not None:
            return BLOCK_FORMATS[self.blocks].format, torch.uint8
        if self.values.dtype not in DTYPE_FORMATS:
            raise ValueError(f"the kernels do not read weights in {self.values.dtype}")
        return DTYPE_FORMATS[self.values.dtype], self.values.dtype


def described(pieces: Sequence[WeightPiece]) -> object:
    """An array of what the kernels are told of pieces."""
    return (Piece * len(pieces))(*(piece.described() for piece in pieces))
