"""A block's weights as plain tensors, and a plain float32 block made of them, whichever backend computes the block.

No module is copied: it may hold what cannot be copied (oneDNN's opaque memory, an offloader's handles) or cast. A
projection with prepacked weights has a method ``plain_weight``. The weight of every other module is read directly; a
weight that is offloaded or quantised is computed as the projection of the identity matrix.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import LayerScales
from nai_t5_core.model.decoder import DecoderBlock
from nai_t5_core.model.encoder import Layout
from nai_t5_core.model.encoder_block import EncoderBlock
from nai_t5_core.model.layers import PLAIN_LINEARS, NoInit, residual_dtype

Block = TypeVar("Block", EncoderBlock, DecoderBlock)

_READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Rows of the identity matrix that are projected at a time.
_ROWS = 1024


@torch.no_grad()
def plain_weight(linear: Any, like: Tensor) -> Tensor:
    """The weight of a projection: [out_features, in_features], in the dtype that it is kept in.

    Args:
        linear: a projection of any class.
        like: a tensor of the device and dtype of the projection's inputs.
    """
    if hasattr(linear, "plain_weight"):
        held: Tensor = linear.plain_weight(like)
        return held
    weight: Tensor = linear.weight
    is_here = type(weight) is nn.Parameter and not weight.is_meta and weight.dtype in _READABLE
    return weight.detach() if is_here and type(linear) in PLAIN_LINEARS else _by_the_identity(linear, like)


def _by_the_identity(linear: Any, like: Tensor) -> Tensor:
    size: int = linear.in_features
    columns = []
    for start in range(0, size, _ROWS):
        rows = torch.zeros(min(_ROWS, size - start), size, dtype=like.dtype, device=like.device)
        rows.diagonal(start).fill_(1)
        columns.append(linear(rows).T)
    return torch.cat(columns, dim=1)


@torch.no_grad()
def plain_twin(block: Block, layout: Layout, config: T5Config, scales: LayerScales, like: Tensor) -> Block:
    """A block in the residual's precision that computes the same as ``block``, without its rounding and overflows.

    Args:
        block: of an encoder or a decoder, with any backend. The twin has no position bias.
        layout, config, scales: what ``block`` was built with.
        like: a tensor of the device and dtype of the inputs of the block's projections.
    """
    kind: Any = DecoderBlock if isinstance(block, DecoderBlock) else EncoderBlock
    make = kind.fused if layout == "fused" else kind.separate
    precision = residual_dtype(like.dtype)
    twin: Block = make(config, False, scales, NoInit, device="meta", dtype=precision)
    for path, linear in twin.named_modules():
        if isinstance(linear, nn.Linear):
            weight = plain_weight(block.get_submodule(path), like).to(like.device, precision)
            linear.weight = nn.Parameter(weight, requires_grad=False)
    for layer, original in zip(twin.layer, block.layer, strict=True):
        layer.layer_norm = original.layer_norm
    return twin
