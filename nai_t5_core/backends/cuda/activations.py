"""Activations in 8 bits, and sums of products of these, which are numbers once they are multiplied by their scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bytes:
    """Activations with a scale for each token.

    Attributes:
        values: [tokens, width] int8 or float8_e4m3fn.
        scales: [tokens] float32.
        dtype: the compute dtype, which products of them are rounded to where nothing else is said.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def raw(self) -> Tensor:
        """The values as kernels write them: int8, or float8 as bytes."""
        return self.values if self.values.dtype == torch.int8 else self.values.view(torch.uint8)

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Sums:
    """Exact sums of products of bytes, each worth the scale of its row times that of its column.

    Attributes:
        values: [tokens, columns] int32.
        row_scales: [tokens] float32.
        column_scales: [columns] float32.
    """

    values: Tensor
    row_scales: Tensor
    column_scales: Tensor


Activations = Tensor | Bytes
