"""The header of a GGUF file: metadata, and where each tensor is.

The package gguf reads headers too, but needs most of a minute for the vocabulary of a UMT5, and trusts every number in
the file. Here every number is checked against the file's size before anything is read or allocated by it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nai_t5_core.facts.config import Shape
from nai_t5_core.facts.nested_text import shown

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_STRING, _ARRAY = 8, 9
# The format's numbers for the kinds of values in metadata, as numpy names them; all are little-endian.
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
# The least bytes of a metadata entry: a name's length, a kind and one byte of a value; and of a tensor's description: a
# name's length, the number of dimensions, a kind and an offset.
_LEAST_ENTRY, _LEAST_TENSOR = 13, 24
_MOST_DIMENSIONS = 4
# Far beyond any vocabulary. A damaged file can look like a list of empty texts, as many as it has bytes.
_MOST_TEXTS = 1 << 20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header describes it.

    Attributes:
        shape: the outermost dimension first, as torch has it.
        kind: the format's number for the tensor's data type.
        start: the byte of the file where its data begin.
    """

    shape: Shape
    kind: int
    start: int


@dataclass(frozen=True)
class Header:
    """Metadata values are numbers, texts, numpy arrays of numbers, or lists of UTF-8 texts as bytes."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: str | Path) -> Header:
    """The header of a GGUF file, little-endian, version 2 or 3.

    Raises:
        ValueError: the file is damaged, or of another version; put the file's name in front of the message.
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        begin = file.read(8)
    version = int.from_bytes(begin[4:], "little")
    if begin.startswith(_MAGIC) and len(begin) == 8 and version not in _VERSIONS:
        raise ValueError(
            f"is a GGUF file of version {version:,}, or of a machine with its bytes in another order; versions "
            f"{' and '.join(map(str, _VERSIONS))} in the usual order can be read; use another file of the same model"
        )
    try:
        return _read(_Cursor(np.memmap(path, mode="r")))
    except ValueError as error:
        raise ValueError(f"is a damaged GGUF file ({error}); fetch it again") from error


def _read(cursor: _Cursor) -> Header:
    begin = bytes(cursor.take(8))
    if not begin.startswith(_MAGIC):
        raise ValueError(f"it begins with {begin[:4]!r}")
    tensor_count, entry_count = cursor.number("<Q"), cursor.number("<Q")
    least = tensor_count * _LEAST_TENSOR + entry_count * _LEAST_ENTRY
    if least > cursor.size:
        raise ValueError(
            f"it promises {tensor_count:,} tensors and {entry_count:,} metadata, which do not fit into its "
            f"{cursor.size:,} bytes"
        )
    metadata = _distinct(entry_count, lambda: (cursor.text(), cursor.value(cursor.number("<I"))))
    stored = _distinct(tensor_count, lambda: (cursor.text(), _described(cursor)))
    alignment = metadata.get(_ALIGNMENT, 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{_ALIGNMENT} is {shown(alignment)}; a number of bytes is needed")
    data = -(-cursor.position // alignment) * alignment
    tensors = {name: StoredTensor(shape, kind, data + offset) for name, (shape, kind, offset) in stored.items()}
    return Header(metadata, tensors)


def _distinct(count: int, read: Callable[[], tuple[str, Any]]) -> dict[str, Any]:
    """Entries by name; two of one name are refused, such as those that a file of zeros seems to have."""
    found: dict[str, Any] = {}
    for _ in range(count):
        name, value = read()
        if name in found:
            raise ValueError(f"it has {name!r} twice")
        found[name] = value
    return found


def _described(cursor: _Cursor) -> tuple[Shape, int, int]:
    """Shape, kind and offset of a tensor."""
    count = cursor.number("<I")
    if count > _MOST_DIMENSIONS:
        raise ValueError(f"a tensor has {count:,} dimensions; {_MOST_DIMENSIONS} are the most")
    shape = tuple(reversed([cursor.number("<Q") for _ in range(count)]))
    return shape, cursor.number("<I"), cursor.number("<Q")


class _Cursor:
    """Reads one value after the other."""

    def __init__(self, content: np.ndarray) -> None:
        self.content = content.data
        self.size = len(content)
        self.position = 0
        self.texts = 0

    def take(self, size: int) -> memoryview:
        begin = self.position
        if size > self.size - begin:
            raise ValueError(f"{size:,} bytes are to follow byte {begin:,}, and it ends at byte {self.size:,}")
        self.position += size
        return self.content[begin : self.position]

    def number(self, kind: str) -> int:
        (value,) = struct.unpack(kind, self.take(struct.calcsize(kind)))
        return int(value)

    def raw_text(self) -> bytes:
        self.texts += 1
        if self.texts > _MOST_TEXTS:
            raise ValueError(f"its header has more than {_MOST_TEXTS:,} texts")
        return bytes(self.take(self.number("<Q")))

    def text(self) -> str:
        return self.raw_text().decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(self.number("<I"), self.number("<Q"))
        return self._numbers(kind, 1)[0].item()

    def _array(self, kind: int, count: int) -> Any:
        if kind == _ARRAY:
            raise ValueError("it has lists in a list, which llama.cpp does not read either")
        if kind == _STRING:
            return [self.raw_text() for _ in range(count)]
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise ValueError(f"metadata of the unknown kind {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(dtype.itemsize * count), dtype)
