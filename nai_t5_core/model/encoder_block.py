"""A layer of the encoder, fused or separate, by torch or by the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import LayerScales
from nai_t5_core.kernels.build import prepare_kernels
from nai_t5_core.model.attention import Attend, FusedSelfAttention, SelfAttention, SelfAttentionLayer
from nai_t5_core.model.kernel_block import kernels_of
from nai_t5_core.model.layers import (
    FeedForward,
    FeedForwardLayer,
    FoldedRMSNorm,
    FusedGatedFeedForward,
    GatedFeedForward,
    RMSNorm,
)


class EncoderBlock(nn.Module):
    """One layer: self-attention, then feed-forward."""

    layer: nn.ModuleList

    @classmethod
    def fused(
        cls, config: T5Config, has_bias: bool, scales: LayerScales, ops: Any = nn, **factory: Any
    ) -> EncoderBlock:
        """Joined projections with the norm weights and the scales multiplied into them."""
        feed_forward = FusedGatedFeedForward if config.gated else FeedForward
        return cls(
            SelfAttentionLayer(
                FoldedRMSNorm(config.d_model, config.layer_norm_epsilon, factory.get("device")),
                FusedSelfAttention(config, ops, has_bias, **factory),
                scales.attention_out,
            ),
            FeedForwardLayer(
                FoldedRMSNorm(config.d_model, config.layer_norm_epsilon, factory.get("device")),
                feed_forward(config, ops, **factory),
                scales.feed_forward_out,
            ),
        )

    @classmethod
    def separate(
        cls, config: T5Config, has_bias: bool, scales: LayerScales, ops: Any = nn, **factory: Any
    ) -> EncoderBlock:
        """The original tensors; what the scales do to weights in the fused layout is done to activations."""
        feed_forward = GatedFeedForward if config.gated else FeedForward
        inner_scale = scales.hidden * scales.feed_forward_out
        return cls(
            SelfAttentionLayer(
                RMSNorm(config.d_model, config.layer_norm_epsilon, factory.get("device")),
                SelfAttention(config, ops, has_bias, scales.attention_out, **factory),
                scales.attention_out,
            ),
            FeedForwardLayer(
                RMSNorm(config.d_model, config.layer_norm_epsilon, factory.get("device")),
                feed_forward(config, ops, inner_scale, **factory),
                inner_scale,
            ),
        )

    def __init__(self, attention: SelfAttentionLayer, feed_forward: FeedForwardLayer) -> None:
        super().__init__()
        self.layer = nn.ModuleList([attention, feed_forward])

    def forward(self, residual: Tensor, attend: Attend, dtype: torch.dtype) -> Tensor:
        """[tokens, d_model] residual to residual, changed in place in inference; ``dtype`` is the compute dtype."""
        if (kernels := kernels_of(self, dtype)) and prepare_kernels() is None:
            return kernels(residual, attend)
        residual = self.layer[0](residual, attend, dtype)
        out: Tensor = self.layer[-1](residual, dtype)
        return out

    def runs_by_kernels(self, dtype: torch.dtype) -> bool:
        """Whether the kernels compute this block in inference. They are not built to find out."""
        with torch.no_grad():
            return kernels_of(self, dtype) is not None
