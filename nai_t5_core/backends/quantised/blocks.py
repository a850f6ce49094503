"""What GGUF's kinds have in common: blocks of 32 or 256 numbers, each with its scales inside.

A block begins on an even byte, and so do the float16 numbers in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nai_t5_core.backends.quantised.kinds import WEIGHT, Layout, Parts, Rows, looked_up, there, wrong_part

# Blocks of bytes [blocks, size] to numbers [blocks, block] float32.
Unpack = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BlockKind:
    """A kind whose only part is bytes: every row is whole blocks.

    Attributes:
        name: as in the package gguf.
        block: numbers in a block.
        size: bytes of a block.
        halves: the bytes of a block at which its float16 scales begin.
        make: numbers of blocks.
    """

    name: str
    block: int
    size: int
    halves: tuple[int, ...]
    # A function is printed with where it lies in memory, and a kind is known by how it is printed.
    make: Unpack = field(repr=False)

    def fault(self, layout: Layout, shape: tuple[int, int]) -> str | None:
        rows, columns = shape
        if columns % self.block:
            return f"rows of {columns:,} numbers are no whole blocks of {self.block}"
        return wrong_part(layout, WEIGHT, (rows, columns // self.block * self.size), torch.uint8)

    def scales(self, parts: Parts) -> Iterator[tuple[str, Tensor]]:
        # Seen in place: a copy of all blocks would take the time of reading them once more.
        halves = parts[WEIGHT].reshape(-1, self.size).view(torch.float16)
        for start in self.halves:
            yield "the scale of a block", halves[:, start // 2]

    def unpack(self, parts: Parts, rows: Rows) -> Tensor:
        packed = parts[WEIGHT][rows]
        blocks = packed.reshape(-1, self.size)
        return self.make(blocks).reshape(len(packed), -1)


def half(blocks: Tensor, start: int) -> Tensor:
    """The float16 number at a byte of every block: [blocks, 1] float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def nibbles(packed: Tensor, width: int) -> Tensor:
    """4 bits each: of every ``width`` bytes the lower halves, then the upper ones; [blocks, bytes] to twice as many."""
    groups = packed.reshape(len(packed), -1, 1, width)
    return torch.cat((groups & 15, groups >> 4), dim=2).reshape(len(packed), -1)


def fifth_bits(packed: Tensor) -> Tensor:
    """32 bits from 4 bytes, each at its place as a fifth bit: [blocks, 4] to [blocks, 32], 0 or 16."""
    return ((packed[:, :, None] >> there(_EACH_BIT, packed.device)) & 1).reshape(len(packed), -1) << 4


_EACH_BIT = torch.arange(8, dtype=torch.uint8)
# The 16 values of IQ4_NL and IQ4_XS.
_UNEVEN = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32)


def uneven(indices: Tensor) -> Tensor:
    """The values of 4-bit indices, float32."""
    return looked_up(there(_UNEVEN, indices.device), indices)
