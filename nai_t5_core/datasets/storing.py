"""Rows as numbers of fewer bits, and as bytes that compress.

A row ``x`` is kept as ``x = rows · scale of the row · scale of the channel``. T5's outputs have a few channels that are
many times larger than the others in every prompt; without scales of channels these would take the 8 bits for
themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nai_t5_core.datasets.coding import Coder
from nai_t5_core.datasets.recipe import Store

_LARGEST = {"int8": 127.0, "float8": 448.0}
_DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8, "float8": torch.float8_e4m3fn}
# Rows at a time, so that no shard is in memory in float32.
_ROWS = 8192


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


def pack_rows(rows: Tensor, coder: Coder) -> bytes:
    """The bytes of rows in two thirds of their room (bfloat16), or nine tenths (8 bits); lossless.

    Of a bfloat16 number only the exponent can be foretold. So its bits are rotated by one: the first byte of each then
    is mantissa and sign, which are kept as they are, all first bytes before all second ones; and the second byte is the
    exponent, which is coded.
    """
    numbers = rows.contiguous().view(-1)
    if rows.element_size() == 1:
        return coder.code(numbers.view(torch.uint8).numpy().data)
    bits = numbers.view(torch.int16).numpy().view(np.uint16)
    rotated = (bits << 1 | bits >> 15).astype("<u2").view(np.uint8).reshape(-1, 2)
    return rotated[:, 0].tobytes() + coder.code(np.ascontiguousarray(rotated[:, 1]).data)


def unpack_rows(packed: memoryview, shape: tuple[int, int], dtype: torch.dtype, coder: Coder) -> Tensor:
    """The rows [rows, d_model] that :func:`pack_rows` was given.

    Raises:
        ValueError: the bytes are damaged.
    """
    count = shape[0] * shape[1]
    if dtype.itemsize == 1:
        return torch.frombuffer(bytearray(coder.decode(packed, count)), dtype=dtype).view(shape)
    rotated = np.empty((count, 2), np.uint8)
    rotated[:, 0] = np.frombuffer(packed, np.uint8, count)
    rotated[:, 1] = np.frombuffer(coder.decode(packed[count:], count), np.uint8)
    bits = rotated.view("<u2").reshape(-1)
    numbers = (bits >> 1 | bits << 15).astype(np.uint16).view(np.int16)
    return torch.from_numpy(numbers).view(dtype).view(shape)
