"""Our encoder around the modules of a ComfyUI T5, which stay where they are.

ComfyUI loads, offloads, patches (LoRA) and dequantises the weights of the modules it built. Those very modules take the
places of ours here, so all of that holds for us too, and no weight is in memory twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.attention import distance_table
from nai_t5_core.config import T5Config
from nai_t5_core.encoder import Encoder, T5EncoderStack
from nai_t5_core.layers import NoInit
from nai_t5_core.scales import StackScales, published_scales


def config_of(t5: Any) -> T5Config:
    """The sizes of a T5 of ComfyUI's or of ours, read from its modules: weights may not be there yet, or quantised."""
    blocks = t5.encoder.block
    attention, dense = blocks[0].layer[0].SelfAttention, blocks[0].layer[-1].DenseReluDense
    bias = attention.relative_attention_bias
    gated = hasattr(dense, "wi_0")
    return T5Config(
        vocab_size=t5.shared.num_embeddings,
        d_model=t5.shared.embedding_dim,
        d_kv=attention.q.out_features // bias.embedding_dim,
        d_ff=dense.wo.in_features,
        num_heads=bias.embedding_dim,
        num_layers=len(blocks),
        gated=gated,
        activation="gelu_new" if gated else "relu",
        bias_per_layer=all(
            getattr(block.layer[0].SelfAttention, "relative_attention_bias", None) is not None for block in blocks
        ),
        relative_attention_num_buckets=bias.num_embeddings,
    )


class SharedEncoder(Encoder):
    """The blocks, where a bias table is asked of its module, which may be patched, quantised or on another device."""

    device: torch.device = torch.device("cpu")

    def bias_table(self, index: int, device: torch.device | None = None) -> Tensor:
        block: Any = self.block[index if self.bias_per_layer else 0]
        embedding = block.layer[0].SelfAttention.relative_attention_bias
        buckets = torch.arange(self.num_buckets, device=device or self.device)
        return distance_table(embedding(buckets, out_dtype=torch.float32), self.max_distance)


class SharedStack(T5EncoderStack):
    """The encoder in the separate layout on the modules of ``t5``, computing in ``dtype``.

    The weights' own dtype is theirs: every module casts its weight to that of its input. ``scales`` keep float16 in
    range; by default those published for a model of this size.
    """

    def __init__(self, t5: nn.Module, dtype: torch.dtype, scales: StackScales | None = None) -> None:
        config = config_of(t5)
        if scales is None and dtype == torch.float16:
            scales = published_scales(config)
        super().__init__(config, "separate", NoInit, scales, device="meta")
        self.compute_dtype = dtype
        self.encoder: SharedEncoder = SharedEncoder(config, "separate", self.scales, NoInit, device="meta")
        _take_modules(self, t5)

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype

    @property
    def device(self) -> torch.device:
        """Where the next call computes; weights that are elsewhere come there layer by layer."""
        return self.encoder.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.encoder.device = device


def _take_modules(stack: nn.Module, t5: nn.Module) -> None:
    """Puts every innermost module of ``t5`` into the place of the same name."""
    for name, module in t5.named_modules():
        if name and next(module.children(), None) is None:
            parent, _, place = name.rpartition(".")
            setattr(stack.get_submodule(parent), place, module)
