"""The products of a block by the kernels, from the modules' own weights or from copies in panels.

These round less often than torch: activation and gating are applied to float32 sums, and a sublayer's
output is added to the residual without rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from nai_t5_core.backends.kernels.calls import add_product, encode_block, normed_product
from nai_t5_core.backends.kernels.sets import InstructionSet
from nai_t5_core.backends.kernels.weights import KernelWeight, or_best
from nai_t5_core.facts.config import Activation
from nai_t5_core.model.attention import Attend, DocumentLayer
from nai_t5_core.model.decoder_attention import CrossAttend
from nai_t5_core.model.layers import FeedForward

Own = TypeVar("Own", bound="BlockOfKernels")


@dataclass(frozen=True)
class BlockOfKernels:
    """A block as its weights, in the order of their use, and the numbers that the kernels need.

    Plain weights are the modules' own tensors, so that changes of their values take effect. ``dtype`` is the model's.
    The last but one is the feed-forward's first, gated or not, and the last is wo.
    """

    weights: tuple[KernelWeight, ...]
    dtype: torch.dtype
    activation: Activation
    heads: int
    epsilon: float

    @classmethod
    def of(
        cls: type[Own],
        weights: Sequence[Tensor],
        dtype: torch.dtype,
        dense: Any,
        heads: int,
        epsilon: float,
        scales: Sequence[Tensor | None] | None = None,
        instructions: InstructionSet | None = None,
    ) -> Own:
        """From the weights in order, [out_features, in_features]; q, k, v and gate, up one above the other.

        ``dtype`` is the model's; ``dense`` is the feed-forward module, which has the activation function. Weights in
        int8 need ``scales``, and must be put in panels. Without ``instructions`` it is the best set of this processor.
        """
        instructions = or_best(instructions)
        is_gated = [*([False] * (len(weights) - 2)), not isinstance(dense, FeedForward), False]
        stored = instructions.stored[dtype]
        made = (
            KernelWeight.plain(weight, stored, gated, scale, instructions)
            for weight, gated, scale in zip(weights, is_gated, scales or [None] * len(weights), strict=True)
        )
        return cls(tuple(made), dtype, dense.activation, heads, epsilon)

    @property
    def is_in_panels(self) -> bool:
        return all(weight.is_in_panels for weight in self.weights)

    @property
    def widening(self) -> str:
        """Says that it computes in float32 a model that is in fewer bits; empty where it does not."""
        return ", in float32" if self.weights[0].dtype == torch.float32 != self.dtype else ""

    def in_panels(self: Own) -> Own:
        """The block with copies of its weights in panels, which no call has to rearrange; itself if it has them."""
        if self.is_in_panels:
            return self
        return replace(self, weights=tuple(map(KernelWeight.in_panels, self.weights)))

    def with_next_in_panels(self: Own) -> Own:
        """The same with one weight more in panels; itself if it has them all.

        So a holder that puts this in the place of the other has only that weight in memory twice.
        """
        done = sum(weight.is_in_panels for weight in self.weights)
        if done == len(self.weights):
            return self
        weights = (*self.weights[:done], self.weights[done].in_panels(), *self.weights[done + 1 :])
        return replace(self, weights=weights)

    @staticmethod
    def _add(attended: Tensor, o: KernelWeight, residual: Tensor) -> None:
        """Adds attention's output [..., heads, d_kv], through its projection, to the residual [tokens, d_model]."""
        add_product(attended.reshape(len(residual), o.depth).to(o.dtype).contiguous(), o, residual)

    def _feed_forward(self, residual: Tensor, norm: Tensor | None) -> None:
        inner, wo = self.weights[-2:]
        add_product(normed_product(residual, norm, self.epsilon, inner, self.activation), wo, residual)


class KernelBlock(BlockOfKernels):
    """An encoder's block: the weights are those of qkv, o, wi and wo."""

    def __call__(
        self, residual: Tensor, attend: Attend, attention_norm: Tensor | None = None, dense_norm: Tensor | None = None
    ) -> Tensor:
        """The residual [tokens, d_model], float32, changed in place. Norm weights are [d_model] in float32."""
        if isinstance(attend, DocumentLayer) and (documents := attend.plan.documents) is not None:
            norms, table, scale = (attention_norm, dense_norm), attend.exact_table, attend.plan.scale
            numbers = (self.heads, self.epsilon, self.activation)
            encode_block(residual, self.weights, norms, *numbers, documents, table, scale)
            return residual
        qkv, o, *_ = self.weights
        projected = normed_product(residual, attention_norm, self.epsilon, qkv)
        # Attention by torch, which has its bias in the model's dtype.
        q, k, v = projected.to(self.dtype).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        self._add(attend(q, k, v), o, residual)
        self._feed_forward(residual, dense_norm)
        return residual


class KernelDecoderBlock(BlockOfKernels):
    """A decoder's block: the weights are those of qkv, o, cross-attention's q and o, wi and wo.

    Attention is torch's; keys and values of cross-attention are made elsewhere, once for each prompt.
    """

    def __call__(self, residual: Tensor, attend: Attend, attend_across: CrossAttend, *norms: Tensor | None) -> Tensor:
        """The residual [prompts, queries, d_model], float32 and contiguous, changed in place.

        ``norms`` are the weights of the three norms, [d_model] in float32; None for ones.
        """
        qkv, o, across_q, across_o, *_ = self.weights
        attention_norm, across_norm, dense_norm = norms
        rows = residual.view(-1, residual.shape[-1])
        heads = (*residual.shape[:2], -1, self.heads, qkv.columns // (3 * self.heads))
        q, k, v = normed_product(rows, attention_norm, self.epsilon, qkv).to(self.dtype).view(heads).unbind(2)
        self._add(attend(q, k, v), o, rows)
        (q,) = normed_product(rows, across_norm, self.epsilon, across_q).to(self.dtype).view(heads).unbind(2)
        self._add(attend_across(q), across_o, rows)
        self._feed_forward(rows, dense_norm)
        return residual
