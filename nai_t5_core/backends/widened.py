"""Products in float32 from weights in fewer bits, by torch: what computes a block that its kernels lend.

On processors that only our kernels compute 16-bit weights fast on, a live LoRA needs the projections one by one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nai_t5_core.backends.held import ByModules, HeldLinear, original_weight
from nai_t5_core.backends.int8_weight import Int8Weight
from nai_t5_core.backends.products import projections
from nai_t5_core.model.block import Block


class WidenedProduct:
    """A product with a weight that is kept as it is, and in float32 for the time of a call.

    Args:
        weight: [out_features, in_features], a float tensor or one in 8 bits.
        dtype: of the result.
    """

    def __init__(self, weight: Tensor | Int8Weight, dtype: torch.dtype) -> None:
        self._weight, self.dtype = weight, dtype
        values = weight.values if isinstance(weight, Int8Weight) else weight
        self.out_features, self.in_features = values.shape

    @property
    def in_8_bits(self) -> bool:
        return isinstance(self._weight, Int8Weight)

    def __call__(self, x: Tensor) -> Tensor:
        """[…, in_features] in any dtype to […, out_features] in ``dtype``."""
        weight = self._weight.plain() if isinstance(self._weight, Int8Weight) else self._weight.float()
        return F.linear(x.float(), weight).to(self.dtype)

    def original(self) -> Tensor | Int8Weight:
        """The weight that was given."""
        return self._weight

    def __str__(self) -> str:
        return f"{'8 bits' if self.in_8_bits else 'as it is'}, widened in every call"


class WidenedBackend:
    """Keeps every weight of a block as it is, and computes products in float32."""

    name = "torch, in float32"

    def missing(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if device.type == "cpu" else f"the model is on {device}; widened products are for the CPU"

    def refuses(self, block: Block, dtype: torch.dtype) -> str | None:
        return None

    def bind(self, block: Block, dtype: torch.dtype) -> None:
        for layer in block.layer:
            for sublayer in layer.children():
                for owner, attribute, _ in projections(sublayer):
                    setattr(owner, attribute, self.held(getattr(owner, attribute), dtype))
        block.runner = ByModules(self.name)

    @staticmethod
    def held(linear: nn.Module, dtype: torch.dtype) -> HeldLinear:
        """The projection that replaces ``linear``, with a result in ``dtype``."""
        return HeldLinear([WidenedProduct(original_weight(linear), dtype)], dtype=dtype)


WIDENED = WidenedBackend()
