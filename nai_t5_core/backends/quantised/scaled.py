"""Kinds with a scale beside the values: float8 and int8, per weight, per row or per block, and those of ComfyUI.

The names of the parts are those that ComfyUI gives them, whatever a file calls them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nai_t5_core.backends.quantised.kinds import WEIGHT, Layout, Parts, Rows, looked_up, there, wrong_part

SCALE = "weight_scale"
SCALE_2 = "weight_scale_2"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


@dataclass(frozen=True)
class Scaled:
    """Values of one byte, times a scale for the weight, for each row, or for each block of rows and columns.

    Attributes:
        name: what users call it.
        dtype: of the values.
        block: rows and columns of a block; None where a scale is for the weight or a row.
        turned: the columns of a group that a rotation was applied to before the values were rounded; 0 for none. Such
            values have no blocks.
        unit: what the scale of a row is multiplied by first.
    """

    name: str
    dtype: torch.dtype
    block: tuple[int, int] | None = None
    turned: int = 0
    unit: float = 1.0

    def __post_init__(self) -> None:
        if self.turned and self.block is not None:
            raise ValueError(f"{self.name}: a rotation is undone before the scales of rows, and not of blocks")

    def fault(self, layout: Layout, shape: tuple[int, int]) -> str | None:
        rows, columns = shape
        if self.turned and (columns % self.turned or not is_power_of_4(self.turned)):
            return f"a rotation of {self.turned} columns does not fit rows of {columns}"
        if fault := wrong_part(layout, WEIGHT, shape, self.dtype):
            return fault
        if SCALE not in layout:
            return None if self.dtype in FLOAT8 and self.block is None else f"{SCALE} is missing"
        found = layout[SCALE][0]
        if self.block is not None:
            down, across = self.block
            return wrong_part(layout, SCALE, (-(-rows // down), -(-columns // across)), *FLOATS)
        if found in ((), (1,), (1, 1), (rows,), (rows, 1)):
            return wrong_part(layout, SCALE, found, *FLOATS)
        return f"{SCALE} has shape {list(found)}; only one scale for a whole weight, or one for each row, can be read"

    def scales(self, parts: Parts) -> Iterator[tuple[str, Tensor]]:
        if SCALE in parts:
            yield SCALE, parts[SCALE]

    def unpack(self, parts: Parts, rows: Rows) -> Tensor:
        values = _floats(_rows(parts[WEIGHT], rows))
        if self.turned:
            # Before the scales of rows: sums of whole numbers are exact in any order, and on every device.
            values = turned_back(values, self.turned)
        if SCALE not in parts:
            return values
        scale = parts[SCALE].float()
        if self.block is not None:
            values *= self._of_blocks(scale, rows, values.shape[1])
        elif scale.numel() == 1:
            values *= scale.reshape(())
        else:
            values *= scale.reshape(-1, 1)[rows]
        if self.unit != 1:
            values *= self.unit
        return values

    def _of_blocks(self, scale: Tensor, rows: Rows, columns: int) -> Tensor:
        assert self.block is not None
        down, across = self.block
        numbers = torch.arange(rows.start, rows.stop, device=scale.device) if isinstance(rows, slice) else rows
        return scale[numbers // down].repeat_interleave(across, dim=1)[:, :columns]


@dataclass(frozen=True)
class MXFP8:
    """float8 with a power of two for each 32 columns, as ComfyUI keeps it: the powers in tiles, see :func:`untiled`."""

    name: str = "MXFP8"
    block: int = 32

    def fault(self, layout: Layout, shape: tuple[int, int]) -> str | None:
        if shape[1] % self.block:
            return f"rows of {shape[1]:,} numbers are no whole blocks of {self.block}"
        exponents = (torch.uint8, getattr(torch, "float8_e8m0fnu", torch.uint8))
        return wrong_part(layout, WEIGHT, shape, torch.float8_e4m3fn) or wrong_part(
            layout, SCALE, tiled_shape(shape[0], shape[1] // self.block), *exponents
        )

    def scales(self, parts: Parts) -> Iterator[tuple[str, Tensor]]:
        yield SCALE, _powers(parts[SCALE])

    def unpack(self, parts: Parts, rows: Rows) -> Tensor:
        values = _floats(_rows(parts[WEIGHT], rows))
        count = values.shape[1] // self.block
        powers = _powers(untiled(parts[SCALE].view(torch.uint8), rows, count))
        return (values.reshape(-1, count, self.block) * powers[:, :, None]).reshape(values.shape)


@dataclass(frozen=True)
class NVFP4:
    """4-bit floats with a float8 scale for each 16 columns and one for the weight, as ComfyUI keeps it.

    Of the two in a byte, the first has the upper bits. The scales lie in tiles, see :func:`untiled`.
    """

    name: str = "NVFP4"
    block: int = 16

    def fault(self, layout: Layout, shape: tuple[int, int]) -> str | None:
        rows, columns = shape
        if columns % self.block:
            return f"rows of {columns:,} numbers are no whole blocks of {self.block}"
        return (
            wrong_part(layout, WEIGHT, (rows, columns // 2), torch.uint8)
            or wrong_part(layout, SCALE, tiled_shape(rows, columns // self.block), torch.float8_e4m3fn, torch.uint8)
            or (f"{SCALE_2} is missing" if SCALE_2 not in layout else None)
            or (None if layout[SCALE_2][0] in ((), (1,)) else f"{SCALE_2} has shape {list(layout[SCALE_2][0])}")
            or wrong_part(layout, SCALE_2, layout[SCALE_2][0], *FLOATS)
        )

    def scales(self, parts: Parts) -> Iterator[tuple[str, Tensor]]:
        yield SCALE, parts[SCALE].view(torch.float8_e4m3fn).float()
        yield SCALE_2, parts[SCALE_2]

    def unpack(self, parts: Parts, rows: Rows) -> Tensor:
        packed = parts[WEIGHT][rows]
        values = looked_up(there(E2M1, packed.device), torch.stack((packed >> 4, packed & 15), dim=2))
        count = packed.shape[1] * 2 // self.block
        scale = untiled(parts[SCALE].view(torch.uint8), rows, count).view(torch.float8_e4m3fn).float()
        scale = parts[SCALE_2].float().reshape(()) * scale
        return (values.reshape(-1, count, self.block) * scale[:, :, None]).reshape(len(packed), -1)


def _rows(values: Tensor, rows: Rows) -> Tensor:
    """Some rows of numbers of one byte; torch before 2.6 takes none of float8 by their numbers."""
    return values.view(torch.uint8)[rows].view(values.dtype)


def _floats(values: Tensor) -> Tensor:
    """Numbers of one byte in float32."""
    if values.dtype not in FLOAT8:
        return values.float()
    return looked_up(there(_table(values.dtype), values.device), values.view(torch.uint8))


@lru_cache
@torch.inference_mode(False)
def _table(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


# The values of 1 bit of sign, 2 of exponent and 1 of mantissa.
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def _powers(exponents: Tensor) -> Tensor:
    """Powers of two of bytes that are the exponents of float32 numbers: 0 is zero, and 255 infinity."""
    return (exponents.view(torch.uint8).int() << 23).view(torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Scales in tiles
# ---------------------------------------------------------------------------------------------------------------------


def tiled_shape(rows: int, blocks: int) -> tuple[int, int]:
    """What scales [rows, blocks] are filled up to where they lie in tiles."""
    return -(-rows // 128) * 128, -(-blocks // 4) * 4


def untiled(tiled: Tensor, rows: Rows, blocks: int) -> Tensor:
    """Some rows of scales that lie in the order in which NVIDIA's tensor cores read them: [rows, blocks].

    A tile is 128 rows by 4 blocks. In it the scales of row 0, 32, 64 and 96 stand beside each other, then those of row
    1, 33, 65 and 97, and so on; tiles follow each other along the rows' blocks first.
    """
    across = -(-blocks // 4)
    device = tiled.device
    row = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows.to(device)
    in_row = (row // 128) * across * 512 + (row % 32) * 16 + (row % 128) // 32 * 4
    block = torch.arange(blocks, device=device)
    return tiled.reshape(-1)[in_row[:, None] + (block // 4) * 512 + block % 4]


# ---------------------------------------------------------------------------------------------------------------------
# Rotations
# ---------------------------------------------------------------------------------------------------------------------


def is_power_of_4(number: int) -> bool:
    return number > 1 and number & (number - 1) == 0 and number.bit_length() % 2 == 1


@lru_cache
@torch.inference_mode(False)
def rotation(columns: int, device: torch.device) -> Tensor:
    """The orthogonal matrix of ComfyUI (ConvRot): a regular Hadamard matrix, which is its own inverse."""
    small = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], device=device)
    whole = small
    while len(whole) < columns:
        whole = torch.kron(whole, small)
    return whole / columns**0.5


def turned_back(values: Tensor, columns: int) -> Tensor:
    """Undoes a rotation of every group of columns: [rows, columns of the weight] float32."""
    groups = values.reshape(len(values), -1, columns)
    return torch.matmul(groups, rotation(columns, values.device).T).reshape(values.shape)
