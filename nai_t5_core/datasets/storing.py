"""Rows as numbers of fewer bits, and as bytes that compress.

A row ``x`` is kept as ``x = rows · scale of the row · scale of the channel``. T5's outputs have a few channels that are
many times larger than the others in every prompt; without scales of channels these would take the 8 bits for
themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.datasets.arrow import arrow
from nai_t5_core.datasets.recipe import Store

_LARGEST = {"int8": 127.0, "float8": 448.0}
_DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8, "float8": torch.float8_e4m3fn}
# Rows at a time, so that no shard is in memory in float32.
_ROWS = 8192
_LEVEL = 3


def stored_dtype(store: Store) -> torch.dtype:
    return _DTYPES[store]


@dataclass(frozen=True)
class StoredRows:
    """Rows as they are stored.

    Attributes:
        rows: [rows, d_model] in the stored dtype.
        scales: float32 [rows]; None where the rows are the numbers themselves.
        channels: float32 [d_model]; None in the same case.
    """

    rows: Tensor
    scales: Tensor | None = None
    channels: Tensor | None = None

    def read(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The numbers, [rows, d_model]."""
        if self.scales is None or self.channels is None:
            return self.rows.to(dtype, copy=True)
        return (self.rows.float() * self.scales[:, None] * self.channels).to(dtype)


def reduce_rows(rows: Tensor, store: Store) -> StoredRows:
    """Rows [rows, d_model] of any dtype in the stored dtype, with the scales that they need."""
    if store == "bfloat16":
        return StoredRows(rows.to(torch.bfloat16))
    largest, dtype = _LARGEST[store], _DTYPES[store]
    channels = torch.zeros(rows.shape[1])
    for part in rows.split(_ROWS):
        channels = torch.maximum(channels, part.abs().amax(dim=0).float())
    channels = torch.where(channels > 0, channels, 1.0)
    reduced = torch.empty(rows.shape, dtype=dtype)
    scales = torch.empty(len(rows))
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS].float() / channels
        scale = part.abs().amax(dim=1) / largest
        scale = torch.where(scale > 0, scale, 1.0)
        part /= scale[:, None]
        reduced[start : start + _ROWS] = (part.round_() if store == "int8" else part).to(dtype)
        scales[start : start + _ROWS] = scale
    return StoredRows(reduced, scales, channels)


class Zstd:
    """Blocks of rows, their bytes shuffled: first the first byte of every number, then the second. Lossless."""

    def __init__(self) -> None:
        self._codec: Any = arrow().Codec("zstd", _LEVEL)

    def pack(self, rows: Tensor) -> bytes:
        size = rows.element_size()
        planes = rows.contiguous().view(torch.uint8).view(-1, size).t().contiguous()
        return bytes(self._codec.compress(planes.numpy().data, asbytes=True))

    def unpack(self, packed: memoryview, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        nbytes = shape[0] * shape[1] * dtype.itemsize
        plain = self._codec.decompress(packed, decompressed_size=nbytes, asbytes=True)
        planes = torch.frombuffer(bytearray(plain), dtype=torch.uint8).view(dtype.itemsize, -1)
        return planes.t().contiguous().view(-1).view(dtype).view(shape)
