"""Which quantised weights our CPU kernels read as they lie, and what they are told of them."""

from __future__ import annotations

import torch
from torch import Tensor

from nai_t5_core.backends.kernels.pieces import BLOCK_FORMATS, WEIGHT_FORMATS, WeightPiece
from nai_t5_core.backends.quantised.blocks import BlockKind
from nai_t5_core.backends.quantised.forms import QuantisedForm
from nai_t5_core.backends.quantised.kinds import WEIGHT, Kind, Plain, QuantisedWeight
from nai_t5_core.backends.quantised.scaled import SCALE, Scaled

_SCALED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def is_read(kind: Kind) -> bool:
    """Whether the kernels read weights of a kind."""
    if isinstance(kind, BlockKind):
        return kind.name in BLOCK_FORMATS
    if isinstance(kind, Scaled):
        has_unit = kind.unit != 1 and kind.dtype != torch.int8
        return kind.dtype in _SCALED and kind.block is None and not kind.turned and not has_unit
    return isinstance(kind, Plain) and kind.dtype in WEIGHT_FORMATS


def is_here(form: QuantisedForm) -> bool:
    """Whether its bytes lie where the kernels can read them."""
    return form.weight.device.type == "cpu" and all(part.is_contiguous() for part in form.weight.parts.values())


def piece_of(form: QuantisedForm) -> WeightPiece:
    """The very bytes of a weight of a kind that is read, with what its numbers are multiplied by."""
    weight = form.weight
    kind, values = weight.kind, weight.parts[WEIGHT]
    if isinstance(kind, BlockKind):
        return WeightPiece(values, *weight.shape, kind.name, factors=_factors(form))
    unit = kind.unit if isinstance(kind, Scaled) else 1.0
    return WeightPiece(values, *weight.shape, scales=_scales(weight), factors=_factors(form), unit=unit)


def _scales(weight: QuantisedWeight) -> Tensor | None:
    """One for each row [rows] float32."""
    if SCALE not in weight.parts:
        return None
    # Copied: in a file they may begin within a number.
    return weight.parts[SCALE].float().reshape(-1).expand(weight.shape[0]).clone(memory_format=torch.contiguous_format)


def _factors(form: QuantisedForm) -> Tensor | None:
    """One for each column [columns] float32."""
    if form.columns is None:
        return (
            None if form.scale == 1 else torch.full((form.in_features,), form.scale, dtype=torch.float32, device="cpu")
        )
    return form.columns.float() * form.scale
