"""What a quantised weight is: bytes of some kind, and how the kind makes numbers of them.

A kind is a pure description. It knows nothing of files, modules or T5: of tensors as they lie in a file (its *parts*)
it makes rows of float32 numbers, to the bit as the library that the kind comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]
# Which rows: a run of them, or their numbers [rows] int64.
Rows = slice | Tensor
# Bytes [numbers, bytes of a row] of the rows of a table with these numbers [numbers] int64; None where there are none.
ReadRows = Callable[[Tensor, Tensor], Tensor | None]
# Shape and dtype of the parts, known before any is read.
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

WEIGHT = "weight"
# Numbers that are made at a time: their float32 form and the result stay in a processor's cache.
_SLICE = 1 << 18


class Kind(Protocol):
    """A way to keep a weight [rows, columns] in few bytes."""

    @property
    def name(self) -> str:
        """What users call it."""
        ...

    def fault(self, layout: Layout, shape: tuple[int, int]) -> str | None:
        """What is wrong with the shapes and dtypes of the parts of a weight of this shape; None where they fit."""
        ...

    def scales(self, parts: Parts) -> Iterator[tuple[str, Tensor]]:
        """Whatever multiplies many numbers at once, by name: floats, which must be finite."""
        ...

    def unpack(self, parts: Parts, rows: Rows) -> Tensor:
        """[rows, columns] float32, on the device of the parts: the caller's own, which may be written to."""
        ...


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight as it lies in its file.

    Attributes:
        kind: what its bytes mean.
        shape: rows and columns of the numbers.
        parts: the tensors that stand for it, perhaps mapped from a file.
        read_rows: reads rows of the one part from the file that it is mapped from. Of a mapped table the system brings
            up to 2 MB into memory for each row that is looked up.
    """

    kind: Kind
    shape: tuple[int, int]
    parts: dict[str, Tensor]
    read_rows: ReadRows | None = None

    @property
    def device(self) -> torch.device:
        return self.parts[WEIGHT].device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def rows(self, rows: Rows) -> Tensor:
        """Some rows of the weight: [rows, columns] float32, the caller's own."""
        if self.read_rows is not None and isinstance(rows, Tensor) and self.device.type == "cpu":
            packed = self.read_rows(self.parts[WEIGHT], rows)
            if packed is not None:
                return self.kind.unpack({WEIGHT: packed}, slice(None))
        return self.kind.unpack(self.parts, rows)

    def slices(self) -> Iterator[slice]:
        """Runs of rows of a size that suits a processor's cache; on other devices all rows at once."""
        count, columns = self.shape
        step = max(1, _SLICE // max(1, columns)) if self.device.type == "cpu" else max(1, count)
        for first in range(0, count, step):
            yield slice(first, min(first + step, count))

    def plain(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight [rows, columns]."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        for rows in self.slices():
            out[rows] = self.rows(rows)
        return out

    def moved(self, move: Callable[[Tensor], Tensor]) -> QuantisedWeight:
        """With every part moved, as bytes: whatever would cast numbers finds none."""
        return replace(self, parts={name: _moved(part, move) for name, part in self.parts.items()})

    def to(self, device: torch.device) -> QuantisedWeight:
        """On another device."""
        return self if device == self.device else self.moved(lambda part: part.to(device))

    def fault(self) -> str | None:
        """What is wrong with the scales, whose numbers are looked at; None where all are finite."""
        for name, scale in self.kind.scales(self.parts):
            if not bool(scale.isfinite().all()):
                return f"{name} holds NaN or infinity"
        return None


def _moved(part: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    # A number by itself cannot be seen as bytes.
    return move(part.reshape(-1).view(torch.uint8)).view(part.dtype).reshape(part.shape)


@dataclass(frozen=True)
class Plain:
    """Numbers of a dtype that torch computes in, beside which other weights of a file are quantised."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def fault(self, layout: Layout, shape: tuple[int, int]) -> str | None:
        return wrong_part(layout, WEIGHT, shape, self.dtype)

    def scales(self, parts: Parts) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def unpack(self, parts: Parts, rows: Rows) -> Tensor:
        # A run of rows would be a view of the model's own weight.
        return parts[WEIGHT][rows].to(torch.float32, copy=True)


@lru_cache
@torch.inference_mode(False)
def there(constant: Tensor, device: torch.device) -> Tensor:
    """A constant on a device, copied once: a copy has the host wait for the device, and CUDA graphs cannot have it."""
    return constant.to(device)


def looked_up(table: Tensor, places: Tensor) -> Tensor:
    """The values of a table at places of any shape, which are bytes. Several times as fast as by indexing."""
    return table.to(places.device).index_select(0, places.reshape(-1).int()).reshape(places.shape)


def wrong_part(layout: Layout, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> str | None:
    """What is wrong with a part that must have this shape and one of these dtypes; None where nothing is."""
    if name not in layout:
        return f"{name} is missing"
    found, dtype = layout[name]
    if dtype not in dtypes:
        return f"{name} is {dtype}, and {' or '.join(map(str, dtypes))} is needed"
    if tuple(found) != tuple(shape):
        return f"{name} has shape {list(found)}, and {list(shape)} is needed"
    return None
