"""The products of an encoder block by the kernels for AVX512, from the modules' own weights or from copies in panels.

In bfloat16 less is rounded than where torch computes the block: activation and gating are applied to float32 sums, and
what is added to the residual is not rounded before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.facts.config import Activation
from nai_t5_core.kernels.calls import KernelWeight, add_product, encode_block, normed_product
from nai_t5_core.model.attention import Attend, DocumentLayer
from nai_t5_core.model.layers import FeedForward


@dataclass(frozen=True)
class KernelBlock:
    """A block's products.

    ``weights`` are those of qkv, o, the feed-forward's first, gated or not, and wo. They are read where they lie, so
    that a block of plain weights sees every change that is made to them.
    """

    weights: tuple[KernelWeight, KernelWeight, KernelWeight, KernelWeight]
    activation: Activation
    heads: int
    epsilon: float

    @classmethod
    def of(
        cls,
        weights: Sequence[Tensor],
        dtype: torch.dtype,
        dense: Any,
        heads: int,
        epsilon: float,
        scales: Sequence[Tensor | None] = (None,) * 4,
    ) -> KernelBlock:
        """From the weights of qkv, o, wi and wo, [out_features, in_features]; q, k, v and gate, up one above the other.

        ``dtype`` is that of the activations, ``dense`` the feed-forward module that says which activation there is.
        Weights in int8 have ``scales``, and must be in panels.
        """
        is_gated = (False, False, not isinstance(dense, FeedForward), False)
        qkv, o, inner, wo = map(KernelWeight.plain, weights, (dtype,) * 4, is_gated, scales)
        return cls((qkv, o, inner, wo), dense.activation, heads, epsilon)

    @property
    def is_in_panels(self) -> bool:
        return self.weights[0].is_in_panels

    def in_panels(self) -> KernelBlock:
        """The same on copies in panels, for which nothing is rearranged in every call; itself where it is that."""
        if self.is_in_panels:
            return self
        qkv, o, inner, wo = map(KernelWeight.in_panels, self.weights)
        return replace(self, weights=(qkv, o, inner, wo))

    def __call__(
        self, residual: Tensor, attend: Attend, attention_norm: Tensor | None = None, dense_norm: Tensor | None = None
    ) -> Tensor:
        """The residual [tokens, d_model], float32, changed in place. Norm weights are [d_model] in float32."""
        if isinstance(attend, DocumentLayer) and (documents := attend.plan.documents) is not None:
            norms, table, scale = (attention_norm, dense_norm), attend.exact_table, attend.plan.scale
            numbers = (self.heads, self.epsilon, self.activation)
            encode_block(residual, self.weights, norms, *numbers, documents, table, scale)
            return residual
        qkv, o, inner, wo = self.weights
        projected = normed_product(residual, attention_norm, self.epsilon, qkv)
        q, k, v = projected.unflatten(-1, (3, self.heads, -1)).unbind(-3)
        add_product(attend(q, k, v).flatten(-2).contiguous(), o, residual)
        hidden = normed_product(residual, dense_norm, self.epsilon, inner, self.activation)
        add_product(hidden, wo, residual)
        return residual
