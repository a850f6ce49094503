"""Weights and products in 8 bits: a scale per output channel, and one per token in every call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Activations are stored from 0 to 255 around this zero: oneDNN has fast products of unsigned with signed bytes only.
_ZERO_POINT = 128
_LARGEST = 127.0


@dataclass(frozen=True)
class Int8Weight:
    """A weight in 8 bits.

    Attributes:
        values: [out_features, in_features] int8, from −127 to 127.
        scale: [out_features] float32; what a unit is worth.
        in_scale: [in_features] float32; activations are multiplied by it before they are quantised.
    """

    values: Tensor
    scale: Tensor
    in_scale: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, in_scale: Tensor | None = None) -> Int8Weight:
        """Quantises a weight [out_features, in_features].

        The weight is divided by ``in_scale`` [in_features]. The weight of the norm before, which was folded into this
        weight, is the right one: it holds down the few large channels that would otherwise leave no bits to the others.
        """
        exact = weight.detach().float()
        if in_scale is not None:
            in_scale = torch.where(in_scale == 0, 1.0, in_scale)
            exact = exact / in_scale
        scale = exact.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        return cls((exact / scale[:, None]).round_().to(torch.int8), scale, in_scale)

    @classmethod
    def joined(cls, parts: Sequence[Int8Weight]) -> Int8Weight:
        """One weight of several that read the same input, one above the other; :meth:`chunk` takes it apart."""
        values, scale = (torch.cat(x) for x in zip(*((part.values, part.scale) for part in parts), strict=True))
        return cls(values, scale, parts[0].in_scale)

    def plain(self) -> Tensor:
        """What it stands for: [out_features, in_features] float32, to be multiplied with activations as they are."""
        weight = self.values.float() * self.scale[:, None]
        return weight if self.in_scale is None else weight * self.in_scale

    def chunk(self, count: int) -> list[Int8Weight]:
        """The weights of projections that were joined."""
        parts = zip(self.values.chunk(count), self.scale.chunk(count), strict=True)
        return [Int8Weight(values.contiguous(), scale, self.in_scale) for values, scale in parts]


class Int8Product:
    """A product in 8 bits, by oneDNN. For inference on the CPU only.

    Args:
        weight: what to multiply with.
        dtype: of the result, float32 or bfloat16.
    """

    in_8_bits = True

    def __init__(self, weight: Int8Weight, dtype: torch.dtype = torch.float32) -> None:
        self.out_features, self.in_features = weight.values.shape
        self.dtype = dtype
        self.in_scale, self.out_scale = weight.in_scale, weight.scale
        self.blocked = torch.ops.onednn.qlinear_prepack(weight.values, None)
        self.zero_points = torch.zeros(self.out_features, dtype=torch.long)

    def __call__(self, x: Tensor) -> Tensor:
        """[…, in_features] in any dtype to […, out_features] in ``dtype``."""
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.out_features, dtype=self.dtype)
        values, token_scale = self._quantise(x.float())
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            values,
            1.0,
            _ZERO_POINT,
            self.blocked,
            self.out_scale,
            self.zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return out.mul_(token_scale).to(self.dtype)

    def lies(self) -> Int8Weight:
        """What it was made of."""
        # oneDNN has it the other way round.
        return Int8Weight(self.blocked.to_dense().T.contiguous(), self.out_scale, self.in_scale)

    def _quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes [..., in_features], and what a unit of each token is worth: [..., 1] float32."""
        if self.in_scale is not None:
            x = x * self.in_scale
        # Not the infinity norm, which torch computes twenty times slower.
        largest = x.abs().amax(dim=-1, keepdim=True)
        scale = largest.clamp_(min=torch.finfo(torch.float32).tiny).div_(_LARGEST)
        # The conversion cuts off the fraction; the half makes that a rounding.
        return (x / scale).add_(_ZERO_POINT + 0.5).to(torch.uint8), scale

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or written: oneDNN's order can be neither."""
        return {"weight": self.lies(), "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __str__(self) -> str:
        return "8 bits"
