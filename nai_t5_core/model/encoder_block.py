"""A layer of the encoder, fused or separate."""

from __future__ import annotations

from typing import Any

from torch import nn

from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import LayerScales
from nai_t5_core.model.attention import FusedSelfAttention, SelfAttention, SelfAttentionLayer
from nai_t5_core.model.block import Block
from nai_t5_core.model.layers import (
    FeedForward,
    FeedForwardLayer,
    FoldedRMSNorm,
    FusedGatedFeedForward,
    GatedFeedForward,
    RMSNorm,
)


class EncoderBlock(Block):
    """One layer: self-attention, then feed-forward."""

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
        """The original tensors; the scales, which the fused layout multiplies into weights, multiply activations."""
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
