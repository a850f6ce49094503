"""The decoder: causal self-attention, cross-attention to the encoder's states, feed-forward.

What attends to what is a plan of :mod:`nai_t5_core.model.decoder_attention`, for a whole text at once or for one step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import LayerScales, StackScales
from nai_t5_core.model.attention import Attend, SelfAttentionLayer, query_std
from nai_t5_core.model.block import Block
from nai_t5_core.model.decoder_attention import CrossAttend, CrossMemory, DecoderPlan, causal_table, cross_bias
from nai_t5_core.model.encoder import Layout
from nai_t5_core.model.encoder_block import EncoderBlock
from nai_t5_core.model.layers import FeedForwardLayer, FoldedRMSNorm, RMSNorm, add_sublayer, residual_dtype, scaled
from nai_t5_core.model.packing import Packing


class CrossAttention(nn.Module, ABC):
    """Cross-attention: the projections q and o. Subclasses, one for each layout, have those of keys and values.

    ``scale`` multiplies the input of o, and so the output.
    """

    def __init__(self, config: T5Config, ops: Any, scale: float = 1.0, **factory: Any) -> None:
        super().__init__()
        self.scale = scale
        self.heads, self.d_kv = config.num_heads, config.d_kv
        self.scale_qk = config.scale_qk
        self.q = ops.Linear(config.d_model, config.inner_dim, bias=False, **factory)
        self.o = ops.Linear(config.inner_dim, config.d_model, bias=False, **factory)

    @abstractmethod
    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states [tokens, d_model] to keys and values [tokens, heads, d_kv]."""

    def forward(self, hidden: Tensor, attend: CrossAttend) -> Tensor:
        """[prompts, queries, d_model] to [prompts, queries, d_model]."""
        q = self.q(hidden).unflatten(-1, (self.heads, self.d_kv))
        out: Tensor = self.o(scaled(attend(q).flatten(-2), self.scale))
        return out

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        d_model = self.q.in_features
        nn.init.normal_(self.q.weight, std=query_std(d_model, self.d_kv, self.scale_qk), generator=generator)
        projection: Any
        for name, projection in self.named_children():
            if name not in ("q", "o"):
                nn.init.normal_(projection.weight, std=d_model**-0.5, generator=generator)
        nn.init.normal_(self.o.weight, std=self.o.in_features**-0.5, generator=generator)


class SeparateCrossAttention(CrossAttention):
    """With k and v as modules of their own."""

    def __init__(self, config: T5Config, ops: Any, scale: float = 1.0, **factory: Any) -> None:
        super().__init__(config, ops, scale, **factory)
        self.k = ops.Linear(config.d_model, config.inner_dim, bias=False, **factory)
        self.v = ops.Linear(config.d_model, config.inner_dim, bias=False, **factory)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.heads, self.d_kv)
        return self.k(states).unflatten(-1, shape), self.v(states).unflatten(-1, shape)


class FusedCrossAttention(CrossAttention):
    """With k and v in one matrix, k above v."""

    def __init__(self, config: T5Config, ops: Any, **factory: Any) -> None:
        super().__init__(config, ops, **factory)
        self.kv = ops.Linear(config.d_model, 2 * config.inner_dim, bias=False, **factory)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.kv(states).unflatten(-1, (2, self.heads, self.d_kv)).unbind(-3)
        return keys, values


class CrossAttentionLayer(nn.Module):
    """Norm, cross-attention, and the sum with the residual: ``block[i].layer[1]``.

    The attention's output comes multiplied by ``out_scale``; the sum divides by it.
    """

    def __init__(self, norm: nn.Module, attention: nn.Module, out_scale: float = 1.0) -> None:
        super().__init__()
        self.EncDecAttention = attention
        self.layer_norm = norm
        self.out_scale = out_scale

    def forward(self, residual: Tensor, attend: CrossAttend, dtype: torch.dtype) -> Tensor:
        """[prompts, queries, d_model] residual to residual, changed in place in inference."""
        out = self.EncDecAttention(self.layer_norm(residual).to(dtype), attend)
        return add_sublayer(residual, out, self.out_scale)


class DecoderBlock(Block):
    """One layer: self-attention, cross-attention, feed-forward. The first and the last are those of an encoder block.

    It is called with the residual, the attention function of self-attention, that of cross-attention, and the dtype.
    """

    @classmethod
    def fused(
        cls, config: T5Config, has_bias: bool, scales: LayerScales, ops: Any = nn, **factory: Any
    ) -> DecoderBlock:
        """Joined projections with the norm weights and the scales multiplied into them."""
        norm = FoldedRMSNorm(config.d_model, config.layer_norm_epsilon, factory.get("device"))
        cross = CrossAttentionLayer(norm, FusedCrossAttention(config, ops, **factory), scales.cross_attention_out)
        return cls.around(cross, EncoderBlock.fused(config, has_bias, scales, ops, **factory))

    @classmethod
    def separate(
        cls, config: T5Config, has_bias: bool, scales: LayerScales, ops: Any = nn, **factory: Any
    ) -> DecoderBlock:
        """The original tensors; the scales, which the fused layout multiplies into weights, multiply activations."""
        norm = RMSNorm(config.d_model, config.layer_norm_epsilon, factory.get("device"))
        scale = scales.cross_attention_out
        cross = CrossAttentionLayer(norm, SeparateCrossAttention(config, ops, scale, **factory), scale)
        return cls.around(cross, EncoderBlock.separate(config, has_bias, scales, ops, **factory))

    @classmethod
    def around(cls, cross: CrossAttentionLayer, block: EncoderBlock) -> DecoderBlock:
        """The layers of an encoder's block with cross-attention between them."""
        self_attention, feed_forward = block.layer
        assert isinstance(self_attention, SelfAttentionLayer) and isinstance(feed_forward, FeedForwardLayer)
        return cls(self_attention, cross, feed_forward)

    def __init__(
        self, self_attention: SelfAttentionLayer, cross_attention: CrossAttentionLayer, feed_forward: FeedForwardLayer
    ) -> None:
        super().__init__()
        self.layer = nn.ModuleList([self_attention, cross_attention, feed_forward])


# A block, its self-attention over the text so far, and its cross-attention to the prompt.
BlockInPlan = tuple[nn.Module, Attend, CrossAttend]
RunBlocks = Callable[[Iterable[BlockInPlan], Tensor, torch.dtype], Tensor]


def run_blocks(blocks: Iterable[BlockInPlan], residual: Tensor, dtype: torch.dtype) -> Tensor:
    """[prompts, queries, d_model] residual to residual, through one block after the other."""
    for block, attend, attend_across in blocks:
        residual = block(residual, attend, attend_across, dtype)
    return residual


class Decoder(nn.Module):
    """The stack of blocks: embeddings in, hidden states out."""

    def __init__(self, config: T5Config, layout: Layout, scales: StackScales, ops: Any = nn, **factory: Any) -> None:
        super().__init__()
        self.max_distance = config.relative_attention_max_distance
        self.bias_per_layer = config.bias_per_layer
        make_block = DecoderBlock.fused if layout == "fused" else DecoderBlock.separate
        self.block = nn.ModuleList(
            make_block(config, config.bias_per_layer or index == 0, layer_scales, ops, **factory)
            for index, layer_scales in enumerate(scales.layers)
        )
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon, factory.get("device"))

    def forward(
        self,
        embeddings: Tensor,
        plan: DecoderPlan,
        memory: CrossMemory,
        dtype: torch.dtype,
        run_blocks: RunBlocks = run_blocks,
    ) -> Tensor:
        """[prompts, queries, d_model] in any float dtype to the same in ``dtype``, after the final norm.

        ``run_blocks`` calls the blocks; compiled steps give another function for it.
        """
        # A copy, since blocks change it in place.
        residual = embeddings.to(residual_dtype(dtype), copy=True)
        hidden: Tensor = self.final_layer_norm(run_blocks(self._blocks_in(plan, memory), residual, dtype))
        return hidden.to(dtype)

    def _blocks_in(self, plan: DecoderPlan, memory: CrossMemory) -> Iterator[BlockInPlan]:
        bias: Tensor | None = None
        for index, block in enumerate(self.block):
            if bias is None or self.bias_per_layer:
                bias = plan.bias(index)
            yield block, plan.layer(index, bias), memory.layer(index)

    def bias_tables(self, dtype: torch.dtype) -> list[Tensor]:
        """The bias by distance of every layer that has its own: [heads, 2 · max_distance + 1] each.

        See :func:`nai_t5_core.model.decoder_attention.causal_table`.
        """
        tables = []
        block: Any
        for block in self.block if self.bias_per_layer else self.block[:1]:
            embedding = block.layer[0].SelfAttention.relative_attention_bias
            # Read by calling the embedding: sharded weights are gathered for a module's call only.
            weight = embedding(torch.arange(embedding.num_embeddings, device=embedding.weight.device))
            tables.append(causal_table(weight, self.max_distance).to(dtype))
        return tables

    def read(self, states: Tensor, packing: Packing, mask: Tensor | None, scale: float) -> CrossMemory:
        """The keys and values of every layer, which cross-attention reads at every step.

        Args:
            states: the encoder's hidden states, [tokens, d_model], one row for each position that was computed.
            packing: where those positions are in the batch.
            mask: bool [prompts, length], True at real tokens; None where there are no pad tokens.
            scale: what q·k is multiplied by.
        """
        layers = []
        block: Any
        for block in self.block:
            projected = block.layer[1].EncDecAttention.keys_values(states)
            keys, values = (packing.unpack(x).transpose(1, 2).contiguous() for x in projected)
            layers.append((keys, values))
        return CrossMemory(layers, None if mask is None else cross_bias(mask, states.dtype), scale)
