"""A block's weights as plain tensors, and a block in float32 made of them, in whatever form it computes.

Nothing of the block is copied as a module: forms hold what cannot be copied (opaque memory, handles of a streamer), or
has no tensor that could be cast. A form that keeps weights in an order of its own has a method ``plain_weight``; of
every other module the weight is read where it lies, or, where it is somewhere else or in another code, from the
product with the identity.
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
from nai_t5_core.model.layers import CastingOps, NoInit, residual_dtype

Block = TypeVar("Block", EncoderBlock, DecoderBlock)

# Of these the weight is all there is.
_PRODUCTS = (nn.Linear, NoInit.Linear, CastingOps.Linear)
_READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Rows of the identity that are multiplied at a time.
_ROWS = 1024


@torch.no_grad()
def plain_weight(linear: Any, like: Tensor) -> Tensor:
    """The weight of a projection: [out_features, in_features], in the dtype in which its form has it.

    Args:
        linear: of any form.
        like: a tensor of the device and dtype that it is called with.
    """
    if hasattr(linear, "plain_weight"):
        held: Tensor = linear.plain_weight(like)
        return held
    weight: Tensor = linear.weight
    is_here = type(weight) is nn.Parameter and not weight.is_meta and weight.dtype in _READABLE
    return weight.detach() if is_here and type(linear) in _PRODUCTS else _by_the_identity(linear, like)


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
    """A block in the residual's precision that computes what this one does, but for what is rounded or overflows.

    Args:
        block: of an encoder or a decoder, in any form, without a bias of its own.
        layout, config, scales: what it was built with.
        like: a tensor of the device and dtype that its projections are called with.
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
