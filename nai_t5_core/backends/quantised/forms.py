"""Rows of a projection or a table as a quantised file has them, and what is multiplied into their numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nai_t5_core.backends.quantised.kinds import QuantisedWeight, Rows
from nai_t5_core.model.layers import residual_dtype


@dataclass(frozen=True)
class QuantisedForm:
    """Rows of a projection: a quantised weight, times what is multiplied into the weight where it is unpacked.

    So a projection is to the bit what it would be of the unpacked weight.

    Attributes:
        weight: [out_features, in_features].
        columns: the weight of the norm before it [in_features] float32, which a fused model has in its projections.
        scale: the power of two that keeps float16 in range.
        in_8_bits: whether it was quantised here, and is no longer the weight that was given.
    """

    weight: QuantisedWeight
    columns: Tensor | None = None
    scale: float = 1.0
    in_8_bits: bool = False

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def rows(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Some rows [rows, in_features]; the product is taken in float32 and rounded once."""
        values = self.weight.rows(rows)
        precision = residual_dtype(dtype)
        if self.columns is not None:
            values = values.to(precision).mul_((self.columns * self.scale).to(values.device, precision))
        elif self.scale != 1:
            values = values.to(precision).mul_(self.scale)
        return values.to(dtype)

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The whole weight [out_features, in_features]."""
        out = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        for rows in self.weight.slices():
            out[rows] = self.rows(rows, dtype)
        return out

    def __call__(self, x: Tensor) -> Tensor:
        """[…, in_features] to […, out_features] in the same dtype, on the device of ``x``; by torch."""
        here = self.to(x.device)
        out = x.new_empty(*x.shape[:-1], self.out_features)
        for rows in here.weight.slices():
            out[..., rows] = F.linear(x, here.rows(rows, x.dtype))
        return out

    @property
    def tensors(self) -> list[Tensor]:
        """All that it is kept in."""
        return [*self.weight.parts.values(), *(() if self.columns is None else (self.columns,))]

    def placed(self, place: Callable[[Tensor], Tensor]) -> QuantisedForm:
        """With each of its tensors where ``place`` has one of the same numbers."""
        weight = replace(self.weight, parts={name: place(part) for name, part in self.weight.parts.items()})
        return replace(self, weight=weight, columns=None if self.columns is None else place(self.columns))

    @property
    def state(self) -> tuple[object, ...]:
        """Differs once any of its numbers may do so, as long as this object is kept.

        Of tensors of inference mode that are changed in place it knows nothing.
        """
        states = ((id(each), each.data_ptr(), 0 if each.is_inference() else each._version) for each in self.tensors)
        return self.weight.kind, self.weight.shape, self.scale, *states

    def original(self) -> Tensor:
        """[out_features, in_features] float32."""
        return self.plain(torch.float32)

    def to(self, device: torch.device) -> QuantisedForm:
        """On another device."""
        return self if device == self.weight.device else self._with(self.weight.to(device))

    def moved(self, move: Callable[[Tensor], Tensor]) -> QuantisedForm:
        """With its bytes moved; what is multiplied into them goes along and keeps its dtype."""
        return self._with(self.weight.moved(move))

    def _with(self, weight: QuantisedWeight) -> QuantisedForm:
        return replace(self, weight=weight, columns=None if self.columns is None else self.columns.to(weight.device))

    def __str__(self) -> str:
        return self.weight.kind.name
