"""Encoders whose weights become 8 bits on a card: each projection is brought there, quantised, and let go as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from nai_t5_core.backends.cuda.byte_weight import JoinedForm
from nai_t5_core.backends.held import original_weight
from nai_t5_core.backends.int8_weight import Int8Weight
from nai_t5_core.backends.products import AFTER_THE_SUBLAYER, projections
from nai_t5_core.backends.quantised.kernels import runner_of_quantised
from nai_t5_core.backends.quantised.kinds import QuantisedWeight
from nai_t5_core.backends.quantised.packing import KINDS
from nai_t5_core.backends.quantised.projections import QuantisedForm, QuantisedLinear
from nai_t5_core.backends.quantised.scaled import SCALE
from nai_t5_core.model.block import Block, BlockRunner
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.layers import FoldedRMSNorm, FusedGatedFeedForward

# Numbers that are quantised at a time, in float32 three times over.
_AT_A_TIME = 1 << 24


def quantise_stack(stack: T5EncoderStack, device: torch.device) -> None:
    """Replaces all projections of an encoder, see :func:`quantise_block`, and moves the rest to the device.

    If that fails, an encoder that was elsewhere is what it was; it keeps its weights until all is done. One that was on
    the device already has no room for both: it still computes, and layers that were done stay in 8 bits.
    """
    moves = stack.device != torch.empty(0, device=device).device
    with stack.turns.change(), ExitStack() as undone:
        undone.callback(stack.to, stack.device)
        for block in cast("Iterable[Block]", stack.encoder.block):
            if moves:
                undone.callback(_put_back, block, block.runner, [held[:3] for held in _projections(block)])
            quantise_block(block, stack.dtype, device)
        stack.to(device)
        undone.pop_all()


def quantise_at_rest(stack: T5EncoderStack, device: torch.device) -> None:
    """As :func:`quantise_block`, of every block in turn, whose weights come back to the host's memory."""
    block: Any
    with stack.turns.change():
        for block in stack.encoder.block:
            quantise_block(block, stack.dtype, device)
            block.to("cpu")


def quantise_block(block: Block, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces the projections of a block by such in int8 with a scale per output channel, on a device.

    As for the CPU, the weight of a norm is divided out of the projection that it was folded into, and activations are
    multiplied by it.
    """
    for owner, attribute, original, divisor, parts in _projections(block):
        setattr(owner, attribute, _held(original_weight(original), divisor, parts, dtype, device))
    block.runner = runner_of_quantised(block)


def _projections(block: Block) -> Iterator[tuple[nn.Module, str, nn.Module, Tensor | None, int]]:
    """Each with its owner and name there, the weight of a norm that is in it, and how many parts it is of."""
    for layer in block.layer:
        norm = layer.layer_norm.folded_weight if isinstance(layer.layer_norm, FoldedRMSNorm) else None
        for sublayer in layer.children():
            for owner, attribute, name in projections(sublayer):
                # Gate and up have scales of their own in float16.
                parts = 2 if isinstance(sublayer, FusedGatedFeedForward) and name == "wi" else 1
                divisor = None if name in AFTER_THE_SUBLAYER else norm
                yield owner, attribute, getattr(owner, attribute), divisor, parts


def _put_back(block: Block, runner: BlockRunner | None, before: list[tuple[nn.Module, str, nn.Module]]) -> None:
    for owner, attribute, original in before:
        setattr(owner, attribute, original)
    block.runner = runner


def _held(weight: Any, norm: Tensor | None, parts: int, dtype: torch.dtype, device: torch.device) -> QuantisedLinear:
    plain = weight if isinstance(weight, Tensor) else weight.plain()
    rows, columns = plain.shape
    divisor = None if norm is None else norm.to(device)
    # Outside inference mode: the parts are to be read everywhere.
    with torch.inference_mode(False):
        values = torch.empty(rows, columns, dtype=torch.int8, device=device)
        scales = torch.empty(rows, 1, device=device)
    step = max(1, _AT_A_TIME // columns)
    for first in range(0, rows, step):
        some = slice(first, min(first + step, rows))
        quantised = Int8Weight.of(plain[some].to(device), divisor)
        values[some], scales[some] = quantised.values, quantised.scale[:, None]
        divisor = quantised.in_scale
    forms = []
    for number, own_scales in enumerate(scales.chunk(parts)):
        own = (len(own_scales), columns)
        kept = QuantisedWeight(KINDS["int8"], own, {SCALE: own_scales})
        form = QuantisedForm(kept, divisor, in_8_bits=True)
        forms.append(JoinedForm.of(form, kept, values, None, number * own[0]))
    return QuantisedLinear(forms, dtype)
