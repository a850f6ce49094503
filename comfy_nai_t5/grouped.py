"""A layer's products by ComfyUI's own modules, those of q, k and v, and of gate and up, as groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from comfy_nai_t5.fused import groups
from comfy_nai_t5.pages import JointPages, one_after_the_other
from nai_t5_core.model.layers import GatedFeedForward, gated, scaled

# The products of one input with all weights of a group, or of one input for each, side by side.
Group = Callable[..., Tensor]


class ModuleProducts:
    """The products of one layer, where the modules of a group are called one after the other."""

    def __init__(self, block: Any) -> None:
        self.attention, self.dense = block.layer[0].SelfAttention, block.layer[-1].DenseReluDense
        attention, *inner = self._groups(block)
        self.qkv: Group = attention
        self.wi: Group = inner[0] if inner else self.dense.wi

    def _groups(self, block: Any) -> list[Group]:
        return [partial(_called, linears) for linears in groups(block)]

    def o(self, attended: Tensor) -> Tensor:
        out: Tensor = self.attention.o(attended)
        return out

    def wo(self, inner: Tensor) -> Tensor:
        out: Tensor = self.dense.wo(inner)
        return out

    def feed_forward(self, hidden: Tensor, dense: Any) -> Tensor:
        if not isinstance(dense, GatedFeedForward):
            out: Tensor = dense(hidden)
            return out
        inputs = (hidden,) if dense.scale == 1 else (hidden, scaled(hidden, dense.scale))
        gate, up = self.wi(*inputs).chunk(2, dim=-1)
        return self.wo(gated(gate, up, dense.activation))


class StreamedProducts(ModuleProducts):
    """The products of a layer whose groups lie side by side in ComfyUI's dynamic memory.

    It serves as long as the weights have these places, and knows from one call to the next which of them are there.
    """

    def __init__(self, block: Any, device: torch.device) -> None:
        self.device = device
        super().__init__(block)

    def _groups(self, block: Any) -> list[Group]:
        self.pages = [JointPages(linears, self.device) for linears in groups(block)]
        return list(self.pages)

    def are_of(self, block: Any, device: torch.device) -> bool:
        """Whether the layer's weights have the places that these products know."""
        return all(pages.is_of(linears, device) for pages, linears in zip(self.pages, groups(block), strict=True))


def _called(linears: list[Any], *inputs: Tensor) -> Tensor:
    return one_after_the_other(linears, inputs)
