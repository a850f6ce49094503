"""The header of a GGUF file: metadata, and where each tensor is.

The package gguf reads the same, but takes most of a minute for the vocabulary of a UMT5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_STRING, _ARRAY = 8, 9
# The format's numbers for the kinds of values in metadata, as numpy names them; all are little-endian.
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header describes it.

    Attributes:
        shape: the outermost dimension first, as torch has it.
        kind: the format's number for how values are kept.
        start: the byte of the file where its data begin.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Header:
    """Metadata are numbers, texts, numpy arrays of numbers, or lists of the bytes of texts."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: str | Path) -> Header:
    """The header of a GGUF file, little-endian, version 2 or 3.

    Raises:
        ValueError, struct.error: the file is damaged, or of another version.
    """
    cursor = _Cursor(np.memmap(path, mode="r"))
    magic, version = bytes(cursor.take(4)), cursor.number("<I")
    if magic != _MAGIC or version not in _VERSIONS:
        raise ValueError(f"it begins with {magic!r}, version {version}; versions {_VERSIONS} can be read")
    tensor_count, metadata_count = cursor.number("<Q"), cursor.number("<Q")
    metadata = {cursor.text(): cursor.value(cursor.number("<I")) for _ in range(metadata_count)}
    found = [(cursor.text(), cursor.shape(), cursor.number("<I"), cursor.number("<Q")) for _ in range(tensor_count)]
    alignment = int(metadata.get(_ALIGNMENT, 32))
    data = -(-cursor.position // alignment) * alignment
    return Header(metadata, {name: StoredTensor(shape, kind, data + offset) for name, shape, kind, offset in found})


class _Cursor:
    """Reads one value after the other."""

    def __init__(self, content: np.ndarray) -> None:
        self.content = content.data
        self.position = 0

    def take(self, size: int) -> memoryview:
        begin = self.position
        self.position += size
        if self.position > len(self.content):
            raise ValueError(f"it ends at byte {len(self.content):,} and something is to follow")
        return self.content[begin : self.position]

    def number(self, kind: str) -> int:
        (value,) = struct.unpack(kind, self.take(struct.calcsize(kind)))
        return int(value)

    def raw_text(self) -> bytes:
        return bytes(self.take(self.number("<Q")))

    def text(self) -> str:
        return self.raw_text().decode()

    def shape(self) -> tuple[int, ...]:
        dimensions = [self.number("<Q") for _ in range(self.number("<I"))]
        return tuple(reversed(dimensions))

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(self.number("<I"), self.number("<Q"))
        return self._numbers(kind, 1)[0].item()

    def _array(self, kind: int, count: int) -> Any:
        if kind in _SCALARS:
            return self._numbers(kind, count)
        element: Callable[[], Any] = self.raw_text if kind == _STRING else lambda: self.value(kind)
        return [element() for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise ValueError(f"metadata of the unknown kind {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(dtype.itemsize * count), dtype)
