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
        address: where the table is mapped. One that was moved or copied since is no longer what the file has.
        known_by: what the system knows the file by, whatever its name: device and number.
    """

    path: Path
    start: int
    count: int
    width: int
    address: int
    known_by: tuple[int, int]

    @classmethod
    def of(cls, path: Path, start: int, table: Tensor) -> RowsInFile:
        """Of a table [rows, bytes of a row] uint8 that is mapped from there."""
        count, width = table.shape
        return cls(path, start, count, width, table.data_ptr(), _known_by(path.stat()))

    def __call__(self, table: Tensor, numbers: Tensor) -> Tensor | None:
        """The bytes of rows of the table by their numbers [rows]: [rows, width] uint8.

        None where the table is no longer the mapped one; where one is no number of a row, which is the table's to
        refuse; and where the file is no longer there, or another one is: the mapping still has the old one.

        Raises:
            ValueError: the file has become shorter.
            OSError: it cannot be read.
        """
        wanted = numbers.tolist()
        if table.data_ptr() != self.address or not all(0 <= row < self.count for row in wanted):
            return None
        try:
            file = self.path.open("rb", buffering=0)
        except OSError:
            return None
        with file:
            is_same = _known_by(os.fstat(file.fileno())) == self.known_by
            return self._read(file, wanted) if is_same else None

    def _read(self, file: FileIO, wanted: list[int]) -> Tensor:
        content = torch.empty(len(wanted), self.width, dtype=torch.uint8)
        for row, number in zip(content.numpy(), wanted, strict=True):
            file.seek(self.start + number * self.width)
            if file.readinto(row) != self.width:
                raise ValueError(f"{self.path} has become shorter since it was opened; fetch it again")
        return content


def _known_by(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
