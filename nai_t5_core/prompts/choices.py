"""What a user chooses of an encoder: the arguments of ``TextEncoder.from_pretrained``, kept until it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nai_t5_core.backends.auto_dtype import resolve_dtype
from nai_t5_core.backends.choices import (
    ProductsChoice,
    Quantisation,
    refuse_missing,
    refuse_products,
    refuse_quantising,
)
from nai_t5_core.model.attention_choice import AttentionChoice
from nai_t5_core.model.encoder import Layout
from nai_t5_core.model.precision import resolve_device
from nai_t5_core.weights.chosen import ScalesChoice

if TYPE_CHECKING:
    from nai_t5_core.lora.set import LoraSource


@dataclass(frozen=True)
class Choices:
    """See :meth:`nai_t5_core.TextEncoder.from_pretrained`. Each but ``offload`` may change an embedding."""

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
    offload: bool = False

    @property
    def unpacks(self) -> bool:
        """Whether numbers are made of quantised weights while they are loaded, for merging and compiling need them."""
        return self.unpack or bool(self.loras or self.compile)

    def refuse_impossible(self) -> None:
        """Refuses what no checkpoint can be loaded with, before one is read.

        Raises:
            ValueError: an unknown choice, one that is not possible on this device, or two that exclude each other.
        """
        if self.quantize and self.compile:
            raise ValueError("quantize and compile exclude each other; leave one out")
        where = resolve_device(self.device)
        self._refuse_offloading(where)
        if self.compile and where.type not in ("cpu", "cuda"):
            raise ValueError(f"compile={self.compile!r} is for cpu and cuda, and the device is {where}; leave it out")
        refuse_products(self.products, where, bool(self.compile) or not (self.optimize or self.quantize))
        dtype = resolve_dtype(self.dtype, where)
        refuse_quantising(self.quantize, where, dtype)
        refuse_missing(self.products, where, dtype, self.quantize)

    def _refuse_offloading(self, where: torch.device) -> None:
        if self.offload and self.compile:
            raise ValueError("offload and compile exclude each other; leave one out")
        if self.offload and where.type != "cuda":
            raise ValueError(
                "offload=True has a CUDA device compute with weights from the host's memory, and the device is "
                f"{where}; give device='cuda', or leave it out"
            )
