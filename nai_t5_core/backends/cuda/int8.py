"""Encoders whose weights become 8 bits on a card: each projection is brought there, quantised, and let go as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.cuda.byte_weight import JoinedForm
from nai_t5_core.backends.held import as_it_lies
from nai_t5_core.backends.int8_weight import Int8Weight
from nai_t5_core.backends.products import AFTER_THE_SUBLAYER, projections
from nai_t5_core.backends.quantised.kernels import runner_of_quantised
from nai_t5_core.backends.quantised.kinds import WEIGHT, QuantisedWeight
from nai_t5_core.backends.quantised.packing import KINDS
from nai_t5_core.backends.quantised.projections import QuantisedLinear
from nai_t5_core.backends.quantised.scaled import SCALE
from nai_t5_core.model.block import Block
from nai_t5_core.model.layers import FoldedRMSNorm, FusedGatedFeedForward

# Numbers that are quantised at a time, in float32 three times over.
_AT_A_TIME = 1 << 24


def quantise_block(block: Block, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces the projections of a block by such in int8 with a scale per output channel, on a device.

    As for the CPU, the weight of a norm is divided out of the projection that it was folded into, and activations are
    multiplied by it.
    """
    for layer in block.layer:
        norm = layer.layer_norm.folded_weight if isinstance(layer.layer_norm, FoldedRMSNorm) else None
        for sublayer in layer.children():
            for owner, attribute, name in projections(sublayer):
                # Gate and up have scales of their own in float16.
                parts = 2 if isinstance(sublayer, FusedGatedFeedForward) and name == "wi" else 1
                divisor = None if name in AFTER_THE_SUBLAYER else norm
                held = _held(as_it_lies(getattr(owner, attribute)), divisor, parts, dtype, device)
                setattr(owner, attribute, held)
    block.runner = runner_of_quantised(block)


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
    for own, own_scales in zip(values.chunk(parts), scales.chunk(parts), strict=True):
        kept = QuantisedWeight(KINDS["int8"], (len(own), columns), {WEIGHT: own, SCALE: own_scales})
        forms.append(JoinedForm(kept, divisor, in_8_bits=True, joined=values))
    return QuantisedLinear(forms, dtype)
