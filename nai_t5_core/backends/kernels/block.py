"""The products of an encoder block by the kernels, from the modules' own weights or from copies in panels.

These round less often than torch: activation and gating are applied to float32 sums, and a sublayer's
output is added to the residual without rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.kernels.calls import add_product, encode_block, normed_product
from nai_t5_core.backends.kernels.sets import InstructionSet
from nai_t5_core.backends.kernels.weights import KernelWeight, or_best
from nai_t5_core.facts.config import Activation
from nai_t5_core.model.attention import Attend, DocumentLayer
from nai_t5_core.model.layers import FeedForward


@dataclass(frozen=True)
class KernelBlock:
    """A block as four weights and the numbers that the kernels need.

    ``weights`` are those of qkv, o, wi (gated or not) and wo. Plain weights are the modules' own tensors, so that
    changes of their values take effect. ``dtype`` is the model's.
    """

    weights: tuple[KernelWeight, KernelWeight, KernelWeight, KernelWeight]
    dtype: torch.dtype
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
        instructions: InstructionSet | None = None,
    ) -> KernelBlock:
        """From the weights of qkv, o, wi and wo, [out_features, in_features]; q, k, v and gate, up one above the other.

        ``dtype`` is the model's; ``dense`` is the feed-forward module, which has the activation function. Weights in
        int8 need ``scales``, and must be put in panels. Without ``instructions`` it is the best set of this processor.
        """
        instructions = or_best(instructions)
        is_gated = (False, False, not isinstance(dense, FeedForward), False)
        stored = instructions.stored[dtype]
        qkv, o, inner, wo = (
            KernelWeight.plain(weight, stored, gated, scale, instructions)
            for weight, gated, scale in zip(weights, is_gated, scales, strict=True)
        )
        return cls((qkv, o, inner, wo), dtype, dense.activation, heads, epsilon)

    @property
    def is_in_panels(self) -> bool:
        return self.weights[0].is_in_panels

    @property
    def widening(self) -> str:
        """Says that it computes in float32 a model that is in fewer bits; empty where it does not."""
        return ", in float32" if self.weights[0].dtype == torch.float32 != self.dtype else ""

    def in_panels(self) -> KernelBlock:
        """The block with copies of its weights in panels, which no call has to rearrange; itself if it has them."""
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
        # Attention by torch, which has its bias in the model's dtype.
        q, k, v = projected.to(self.dtype).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        add_product(attend(q, k, v).flatten(-2).to(o.dtype).contiguous(), o, residual)
        hidden = normed_product(residual, dense_norm, self.epsilon, inner, self.activation)
        add_product(hidden, wo, residual)
        return residual
