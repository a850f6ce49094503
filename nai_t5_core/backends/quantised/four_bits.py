"""bitsandbytes' kinds: 4 bits that number the values of a table, with the largest value of each block beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nai_t5_core.backends.quantised.kinds import WEIGHT, Layout, Parts, Rows, looked_up, wrong_part
from nai_t5_core.backends.quantised.scaled import FLOATS

LARGEST = "absmax"
TABLE = "quant_map"
NESTED_LARGEST = "nested_absmax"
NESTED_TABLE = "nested_quant_map"


@dataclass(frozen=True)
class FourBits:
    """NF4 or FP4: of the two numbers in a byte, the first has the upper bits.

    Attributes:
        name: what users call it.
        block: how many numbers share a largest value.
        nested_block: how many of these values share another, where they are quantised themselves; else 0.
        offset: what was taken off them before that.
    """

    name: str
    block: int
    nested_block: int = 0
    offset: float = 0.0

    def fault(self, layout: Layout, shape: tuple[int, int]) -> str | None:
        rows, columns = shape
        if self.block < 1 or columns % self.block:
            return f"rows of {columns:,} numbers are no whole blocks of {self.block}"
        blocks = rows * columns // self.block
        faults = [
            wrong_part(layout, WEIGHT, (rows * columns // 2, 1), torch.uint8),
            wrong_part(layout, TABLE, (16,), *FLOATS),
        ]
        if self.nested_block:
            faults += [
                wrong_part(layout, LARGEST, (blocks,), torch.uint8),
                wrong_part(layout, NESTED_LARGEST, (-(-blocks // self.nested_block),), *FLOATS),
                wrong_part(layout, NESTED_TABLE, (256,), *FLOATS),
            ]
        else:
            faults.append(wrong_part(layout, LARGEST, (blocks,), *FLOATS))
        return next(filter(None, faults), None)

    def scales(self, parts: Parts) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, part) for name, part in parts.items() if part.is_floating_point())
        if self.nested_block:
            yield "nested_offset", torch.tensor(self.offset)

    def unpack(self, parts: Parts, rows: Rows) -> Tensor:
        packed = parts[WEIGHT][rows]
        numbers = torch.stack((packed >> 4, packed & 15), dim=2)
        values = looked_up(parts[TABLE].float(), numbers).reshape(-1, self.block)
        return values.mul_(self._largest(parts, rows)).reshape(len(packed), -1)

    def _largest(self, parts: Parts, rows: Rows) -> Tensor:
        """The largest value of each block of some rows: [blocks, 1] float32."""
        found = parts[LARGEST][rows].reshape(-1, 1)
        if not self.nested_block:
            return found.float()
        count, across = parts[LARGEST].shape
        numbers = torch.arange(count * across, device=found.device).reshape(count, across)[rows].reshape(-1, 1)
        outer = parts[NESTED_LARGEST].float()[numbers // self.nested_block]
        return (looked_up(parts[NESTED_TABLE].float(), found) * outer).add_(self.offset)

    @staticmethod
    def arranged(parts: Parts, rows: int) -> dict[str, Tensor]:
        """The parts as :meth:`unpack` takes them: those that a file has in one line, in rows."""
        return {name: part.reshape(rows, -1) if name in (WEIGHT, LARGEST) else part for name, part in parts.items()}
