"""Rows of a table, read from its file where they are looked up.

Of a table that is mapped, Linux brings up to 2 MB into memory for every row: a prompt of some hundred tokens has all of
it there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowsInFile:
    """Reads rows of a table from the byte ``start`` of a file on.

    Attributes:
        count: rows of the table.
        width: bytes of a row.
        known_by: what the system knows the file by, whatever its name: device and number.
    """

    path: Path
    start: int
    count: int
    width: int
    known_by: tuple[int, int]

    @classmethod
    def of(cls, path: Path, start: int, table: Tensor) -> RowsInFile:
        """Of a table [rows, bytes of a row] uint8 that is mapped from there."""
        count, width = table.shape
        return cls(path, start, count, width, _known_by(path.stat()))

    def __call__(self, numbers: Tensor) -> Tensor | None:
        """The bytes of rows by their numbers [rows]: [rows, width] uint8.

        None where one is no number of a row, which is the mapping's to refuse, and where the file is no longer there,
        or another one is: the mapping still has the old one.

        Raises:
            ValueError: the file has become shorter.
        """
        wanted = numbers.tolist()
        try:
            with self.path.open("rb", buffering=0) as file:
                is_same = _known_by(os.fstat(file.fileno())) == self.known_by
                return self._read(file, wanted) if is_same and all(0 <= row < self.count for row in wanted) else None
        except OSError:
            return None

    def _read(self, file: FileIO, wanted: list[int]) -> Tensor:
        content = torch.empty(len(wanted), self.width, dtype=torch.uint8)
        for row, number in zip(content.numpy(), wanted, strict=True):
            file.seek(self.start + number * self.width)
            if file.readinto(row) != self.width:
                raise ValueError(f"{self.path} has become shorter since it was opened; fetch it again")
        return content


def _known_by(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
