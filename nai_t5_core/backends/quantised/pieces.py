"""Which quantised weights our CPU kernels read as they lie, and what they are told of them."""

from __future__ import annotations

import torch
from torch import Tensor

from nai_t5_core.backends.kernels.beside import BESIDE_FORMATS, NestedScales, ScalesBeside, is_power_of_two, may_share
from nai_t5_core.backends.kernels.pieces import BLOCK_FORMATS, TURNED, WEIGHT_FORMATS, WeightPiece
from nai_t5_core.backends.quantised.blocks import BlockKind
from nai_t5_core.backends.quantised.forms import QuantisedForm
from nai_t5_core.backends.quantised.four_bits import LARGEST, NESTED_LARGEST, NESTED_TABLE, TABLE, FourBits
from nai_t5_core.backends.quantised.kinds import WEIGHT, Kind, Parts, Plain, QuantisedWeight
from nai_t5_core.backends.quantised.scaled import E2M1, MXFP8, NVFP4, SCALE, SCALE_2, Scaled

_SCALED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def is_read(kind: Kind) -> bool:
    """Whether the kernels read weights of a kind."""
    if isinstance(kind, BlockKind):
        return kind.name in BLOCK_FORMATS
    if isinstance(kind, FourBits):
        return may_share(kind.block) and is_power_of_two(kind.nested_block or 1)
    if isinstance(kind, Scaled):
        return _reads_rows(kind) if kind.block is None else _reads_blocks(kind, *kind.block)
    return isinstance(kind, (NVFP4, MXFP8)) or (isinstance(kind, Plain) and kind.dtype in WEIGHT_FORMATS)


def _reads_rows(kind: Scaled) -> bool:
    if kind.turned:
        return kind.dtype == torch.int8 and kind.turned in TURNED and kind.unit == 1
    return kind.dtype in _SCALED and (kind.unit == 1 or kind.dtype == torch.int8)


def _reads_blocks(kind: Scaled, down: int, across: int) -> bool:
    return _in_blocks(kind.dtype) in BESIDE_FORMATS and is_power_of_two(down) and may_share(across) and kind.unit == 1


def _in_blocks(dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} in blocks"


def is_here(form: QuantisedForm) -> bool:
    """Whether its bytes lie where the kernels can read them."""
    return form.weight.device.type == "cpu" and all(part.is_contiguous() for part in form.weight.parts.values())


def piece_of(form: QuantisedForm) -> WeightPiece:
    """The very bytes of a weight of a kind that is read, with what its numbers are multiplied by."""
    weight = form.weight
    kind, beside = weight.kind, _beside(weight)
    return WeightPiece(
        weight.parts[WEIGHT],
        *weight.shape,
        blocks=kind.name if isinstance(kind, BlockKind) else None,
        scales=None if beside else _scales(weight),
        factors=_factors(form),
        unit=_unit(weight),
        turned=kind.turned if isinstance(kind, Scaled) else 0,
        beside=beside,
    )


def _unit(weight: QuantisedWeight) -> float:
    if isinstance(weight.kind, NVFP4):
        return float(weight.parts[SCALE_2].float())
    return weight.kind.unit if isinstance(weight.kind, Scaled) else 1.0


def _scales(weight: QuantisedWeight) -> Tensor | None:
    """One for each row [rows] float32."""
    if SCALE not in weight.parts:
        return None
    # Copied: in a file they may begin within a number.
    return weight.parts[SCALE].float().reshape(-1).expand(weight.shape[0]).clone(memory_format=torch.contiguous_format)


def _beside(weight: QuantisedWeight) -> ScalesBeside | None:
    """Scales of parts of rows, where they have tensors of their own."""
    kind, parts = weight.kind, weight.parts
    if isinstance(kind, FourBits):
        return _of_four_bits(kind, parts)
    if isinstance(kind, NVFP4):
        return ScalesBeside("NVFP4", parts[SCALE].view(torch.uint8), kind.block, table=E2M1)
    if isinstance(kind, MXFP8):
        return ScalesBeside("MXFP8", parts[SCALE].view(torch.uint8), kind.block)
    if isinstance(kind, Scaled) and kind.block is not None:
        down, across = kind.block
        return ScalesBeside(_in_blocks(kind.dtype), parts[SCALE].float(), across, down)
    return None


def _of_four_bits(kind: FourBits, parts: Parts) -> ScalesBeside:
    table, largest = _copied(parts[TABLE]), parts[LARGEST]
    if not kind.nested_block:
        return ScalesBeside("4 bits", largest.float(), kind.block, table=table)
    codes, outer = _copied(parts[NESTED_TABLE]), _copied(parts[NESTED_LARGEST])
    nested = NestedScales(codes, outer, kind.nested_block, kind.offset)
    return ScalesBeside("4 bits, nested", largest, kind.block, table=table, nested=nested)


def _copied(few: Tensor) -> Tensor:
    """In float32; in a file they may begin within a number."""
    return few.to(torch.float32, copy=True)


def _factors(form: QuantisedForm) -> Tensor | None:
    """One for each column [columns] float32."""
    if form.columns is None:
        return (
            None if form.scale == 1 else torch.full((form.in_features,), form.scale, dtype=torch.float32, device="cpu")
        )
    return form.columns.float() * form.scale
