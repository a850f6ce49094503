"""What a user chooses of an encoder: the arguments of ``TextEncoder.from_pretrained``, kept until it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nai_t5_core.backends.choices import ProductsChoice, Quantisation
from nai_t5_core.model.attention_choice import AttentionChoice
from nai_t5_core.model.encoder import Layout
from nai_t5_core.weights.chosen import ScalesChoice

if TYPE_CHECKING:
    from nai_t5_core.lora.set import LoraSource


@dataclass(frozen=True)
class Choices:
    """See :meth:`nai_t5_core.TextEncoder.from_pretrained`. Each of them may change an embedding."""

    dtype: str | torch.dtype = "auto"
    device: str | torch.device = "auto"
    layout: Layout = "fused"
    scales: ScalesChoice = "auto"
    optimize: bool = True
    quantize: Quantisation | None = None
    compile: bool | str = False
    attention: AttentionChoice = "auto"
    loras: Sequence[tuple[LoraSource, float]] = ()
    products: ProductsChoice = "auto"
    unpack: bool = False

    @property
    def unpacks(self) -> bool:
        """Whether numbers are made of quantised weights while they are loaded, for merging and compiling need them."""
        return self.unpack or bool(self.loras or self.compile)
