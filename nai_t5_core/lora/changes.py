"""What a LoRA file adds to one weight: a product of two narrow factors, or a whole difference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nai_t5_core.facts.config import Shape


@dataclass(frozen=True)
class LowRankChange:
    """Scale · up · down is added to a weight, with up [out_features, rank] and down [rank, in_features]."""

    up: Tensor
    down: Tensor
    scale: float

    @property
    def shape(self) -> Shape:
        """Of the weight: (out_features, in_features)."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def is_zero(self) -> bool:
        return not (self.scale and self.up.any() and self.down.any())

    def add_to(self, weight: Tensor, factor: float, columns: Tensor | None = None) -> None:
        """Adds ``factor`` · up · down to a weight in place; ``columns`` [in_features] multiplies what is added."""
        up, down = (tensor.to(weight.device, weight.dtype) for tensor in (self.up, self.down))
        weight.addmm_(up, down if columns is None else down * columns.to(down), alpha=factor)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Up and down, for a product beside the weight."""
        return self.up, self.down


@dataclass(frozen=True)
class WholeChange:
    """A difference of a weight's own shape: of a matrix, an embedding table, or a norm [d_model]."""

    delta: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> Shape:
        """Of the weight."""
        return tuple(self.delta.shape)

    @property
    def is_zero(self) -> bool:
        return not self.delta.any()

    def add_to(self, weight: Tensor, factor: float, columns: Tensor | None = None) -> None:
        """As :meth:`LowRankChange.add_to`, of ``factor`` · delta."""
        delta = self.delta.to(weight.device, weight.dtype)
        weight.add_(delta if columns is None else delta * columns.to(delta), alpha=factor)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The difference and the identity, on the side where that is smaller."""
        rows, columns = self.delta.shape
        if columns <= rows:
            return self.delta, torch.eye(columns, dtype=self.delta.dtype)
        return torch.eye(rows, dtype=self.delta.dtype), self.delta


Change = LowRankChange | WholeChange
