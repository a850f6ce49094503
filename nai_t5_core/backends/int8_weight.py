"""Weights and products in 8 bits: weights have a scale per output channel, activations one per token in every call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Activations are stored as unsigned bytes with this zero point: oneDNN is fast for unsigned times signed bytes only.
_ZERO_POINT = 128
_LARGEST = 127.0


@dataclass(frozen=True)
class Int8Weight:
    """A weight in 8 bits.

    Attributes:
        values: [out_features, in_features] int8, from −127 to 127.
        scale: [out_features] float32; ``values`` times ``scale`` is the weight of an output channel.
        in_scale: [in_features] float32; activations are multiplied by it before they are quantised.
    """

    values: Tensor
    scale: Tensor
    in_scale: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, in_scale: Tensor | None = None) -> Int8Weight:
        """Quantises a weight [out_features, in_features].

        The weight is divided by ``in_scale`` [in_features] first. Give the weight of the preceding norm if it was
        folded into this weight: dividing by it removes the few large channels that would leave few bits for the others.
        """
        exact = weight.detach().float()
        if in_scale is not None:
            # A cast of the model to the dtype that it has casts these, too.
            in_scale = torch.where(in_scale == 0, 1.0, in_scale.detach().float())
            exact = exact / in_scale
        scale = exact.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        return cls((exact / scale[:, None]).round_().to(torch.int8), scale, in_scale)

    @classmethod
    def joined(cls, parts: Sequence[Int8Weight]) -> Int8Weight:
        """The weights of several projections of one input joined into one, rows in order; :meth:`chunk` splits it."""
        values, scale = (torch.cat(x) for x in zip(*((part.values, part.scale) for part in parts), strict=True))
        return cls(values, scale, parts[0].in_scale)

    def plain(self) -> Tensor:
        """The dequantised weight: [out_features, in_features] float32, for activations without ``in_scale``."""
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

    def original(self) -> Int8Weight:
        """The weight that was given."""
        # oneDNN keeps it transposed.
        return Int8Weight(self.blocked.to_dense().T.contiguous(), self.out_scale, self.in_scale)

    def _quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations as bytes [..., in_features], and the scale of each token: [..., 1] float32."""
        if self.in_scale is not None:
            x = x * self.in_scale
        # Not the infinity norm, which torch computes twenty times slower.
        largest = x.abs().amax(dim=-1, keepdim=True)
        scale = largest.clamp_(min=torch.finfo(torch.float32).tiny).div_(_LARGEST)
        # The conversion truncates; adding a half makes it round.
        return (x / scale).add_(_ZERO_POINT + 0.5).to(torch.uint8), scale

    def __getstate__(self) -> dict[str, Any]:
        """The plain weight: a tensor in oneDNN's blocked order can be neither copied nor pickled."""
        return {"weight": self.original(), "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __str__(self) -> str:
        return "8 bits"
