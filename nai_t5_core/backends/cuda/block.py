"""The blocks of an encoder as kernel launches: per layer four products, and four small kernels between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from nai_t5_core.backends.cuda.activations import Activations, Bytes, Sums
from nai_t5_core.backends.cuda.byte_launches import rounded_rows
from nai_t5_core.backends.cuda.byte_weight import ByteWeight, RowScaled, Weight, weight_of
from nai_t5_core.backends.cuda.launches import (
    MARGIN,
    Documents,
    Watch,
    add_norm,
    add_norm_in_form,
    attend,
    attention_table,
)
from nai_t5_core.backends.cuda.torch_products import Products
from nai_t5_core.facts.config import Activation
from nai_t5_core.model.attention import logit_scale
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.layers import FeedForward


@dataclass(frozen=True)
class CudaBlock:
    """A layer in the fused layout, as references to its block's weights.

    ``bias`` is a table from :func:`nai_t5_core.backends.cuda.launches.attention_table`; the two factors undo the
    float16 scales of the out-projections.
    """

    qkv: Weight
    o: Weight
    wi: Weight
    wo: Weight
    bias: Tensor
    attention_factor: float
    feed_forward_factor: float
    activation: Activation
    is_gated: bool
    logit_scale: float
    epsilon: float

    @classmethod
    def of(cls, block: Any, bias: Tensor, logit_scale: float) -> CudaBlock:
        """From an :class:`nai_t5_core.model.encoder_block.EncoderBlock` that the kernels can run."""
        attention, feed_forward = block.layer
        attends, dense = attention.SelfAttention, feed_forward.DenseReluDense
        return cls(
            *(weight_of(attends.qkv), weight_of(attends.o), weight_of(dense.wi), weight_of(dense.wo)),
            bias,
            1 / attention.out_scale,
            1 / feed_forward.out_scale,
            dense.activation,
            not isinstance(dense, FeedForward),
            logit_scale,
            attention.layer_norm.eps,
        )

    @cached_property
    def is_in_bytes(self) -> bool:
        """Whether a weight is in 8 bits."""
        return any(isinstance(weight, ByteWeight) for weight in (self.qkv, self.o, self.wi, self.wo))

    @cached_property
    def weights_in_bytes(self) -> RowScaled | None:
        """The numbers of all four weights, where these are in 8 bits alike, with no scales but those of columns."""
        found = {
            weight.row_scaled if isinstance(weight, ByteWeight) else None
            for weight in (self.qkv, self.o, self.wi, self.wo)
        }
        return found.pop() if len(found) == 1 else None

    def normed(
        self, residual: Tensor, delta: Tensor | Sums | None, factor: float, dtype: torch.dtype, products: Products
    ) -> Activations:
        """Adds what the layer before gives to the residual, in place, and returns this layer's normed input."""
        in_bytes = products.input_bytes(self.weights_in_bytes, len(residual))
        form = (
            dtype,
            in_bytes,
            norm_of(self.qkv),
            products.overlaps(len(residual), self.is_in_bytes, in_bytes is not None),
        )
        return add_norm_in_form(residual, delta, factor, self.epsilon, *form)

    def add_attention(
        self, residual: Tensor, hidden: Activations, documents: Documents, products: Products
    ) -> Activations:
        """Adds the attention's output to the residual in place; takes its normed input, returns the feed-forward's."""
        in_bytes = hidden.values.dtype if isinstance(hidden, Bytes) else None
        overlaps = products.overlaps(len(residual), self.is_in_bytes, in_bytes is not None)
        attended = attend(products.plain(hidden, self.qkv), self.bias, documents, self.logit_scale, overlaps)
        given = attended if in_bytes is None else rounded_rows(attended, in_bytes, hidden.dtype, overlaps)
        delta = products.summed(given, self.o)
        form = (hidden.dtype, in_bytes, norm_of(self.wi), overlaps)
        return add_norm_in_form(residual, delta, self.attention_factor, self.epsilon, *form)

    def feed_forward(self, hidden: Activations, products: Products) -> Tensor | Sums:
        """The feed-forward's output, before it is multiplied by ``feed_forward_factor``."""
        return products.summed(products.activated(hidden, self.wi, self.activation, self.is_gated), self.wo)


class Layer(Protocol):
    """What :class:`CudaBlocks` asks of a layer; see :class:`CudaBlock`."""

    @property
    def is_in_bytes(self) -> bool: ...
    @property
    def feed_forward_factor(self) -> float: ...

    def normed(
        self, residual: Tensor, delta: Tensor | Sums | None, factor: float, dtype: torch.dtype, products: Products
    ) -> Activations: ...

    def add_attention(
        self, residual: Tensor, hidden: Activations, documents: Documents, products: Products
    ) -> Activations: ...

    def feed_forward(self, hidden: Activations, products: Products) -> Tensor | Sums: ...


@dataclass(frozen=True)
class CudaBlocks:
    """All layers between embedding and hidden states. ``final_weight`` is the final norm's weight, in float32."""

    blocks: tuple[Layer, ...]
    final_weight: Tensor
    final_epsilon: float
    dtype: torch.dtype

    @classmethod
    def of(cls, stack: T5EncoderStack, blocks: tuple[CudaBlock, ...]) -> CudaBlocks:
        """From a stack that the kernels can run, and its :func:`cuda_blocks`."""
        return cls(
            blocks,
            stack.encoder.final_layer_norm.weight,
            stack.encoder.final_layer_norm.eps,
            stack.dtype,
        )

    def __call__(self, residual: Tensor, documents: Documents, products: Products, watch: Watch) -> Tensor:
        """Residual [tokens, d_model] in float32, changed in place, to hidden states in the compute dtype.

        Rows that belong to no document have undefined values in the result.
        """
        hidden = self.blocks[0].normed(residual, None, 1.0, self.dtype, products)
        for block, following in zip(self.blocks, (*self.blocks[1:], None), strict=True):
            hidden = block.add_attention(residual, hidden, documents, products)
            delta = block.feed_forward(hidden, products)
            factor = block.feed_forward_factor
            if following is not None:
                # The sum of this layer and the norm of the next in one launch.
                hidden = following.normed(residual, delta, factor, self.dtype, products)
        overlaps = products.overlaps(len(residual), block.is_in_bytes, isinstance(hidden, Bytes))
        return add_norm(
            residual, delta, factor, self.final_epsilon, self.dtype, self.final_weight, watch, overlaps=overlaps
        )


def cuda_blocks(stack: T5EncoderStack, biases: Tensor) -> tuple[CudaBlock, ...]:
    """The layers of a stack that the kernels can run; ``biases`` has one table for each, or one for all."""
    scale = logit_scale(stack.config)
    return tuple(
        CudaBlock.of(block, biases[index if len(biases) > 1 else 0], scale)
        for index, block in enumerate(stack.encoder.block)
    )


def norm_of(weight: Weight) -> Tensor | None:
    """What a product's inputs are multiplied by before: [in_features] float32; None where that is in the weight."""
    return weight.norm if isinstance(weight, ByteWeight) else None


class BiasTables:
    """The bias by distance of every layer, or the one that all share, in one float32 tensor whose address stays."""

    def __init__(self, stack: T5EncoderStack) -> None:
        config = stack.config
        count = config.num_layers if config.bias_per_layer else 1
        distances = 2 * (config.relative_attention_max_distance + MARGIN) + 1
        # Outside inference mode: an inference tensor could only be refreshed under inference mode.
        with torch.inference_mode(False):
            self.tables = torch.empty(count, config.num_heads, distances, device=stack.device)
        self._made_from: list[Any] = []

    def refresh(self, stack: T5EncoderStack) -> None:
        """Computes the tables anew if a weight has changed, or is an inference tensor, which has no version counter."""
        blocks: Any = stack.encoder.block
        weights = [blocks[index].layer[0].SelfAttention.relative_attention_bias.weight for index in self._layers]
        if not any(weight.is_inference() for weight in weights):
            made_from = [(weight, weight._version) for weight in weights]
            if _are_same(made_from, self._made_from):
                return
            self._made_from = made_from
        for index in self._layers:
            self.tables[index].copy_(attention_table(stack.encoder.bias_table(index)))

    @property
    def _layers(self) -> range:
        return range(len(self.tables))


def _are_same(some: list[tuple[Tensor, int]], others: list[tuple[Tensor, int]]) -> bool:
    """Whether both lists have the same tensors in the same versions."""
    return len(some) == len(others) and all(
        a is b and version == other for (a, version), (b, other) in zip(some, others, strict=True)
    )
