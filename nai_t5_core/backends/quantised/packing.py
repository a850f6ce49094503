"""Plain weights into kinds that are written here: int8 and float8 with scales, and two kinds of GGUF's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from nai_t5_core.backends.int8_weight import Int8Weight
from nai_t5_core.backends.quantised.blocks import BlockKind
from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.backends.quantised.kinds import WEIGHT, Kind, Layout, Plain, QuantisedWeight
from nai_t5_core.backends.quantised.scaled import SCALE, Scaled

PackedKind = Literal["int8", "q8_0", "q4_k", "float8"]
PACKED_KINDS: tuple[PackedKind, ...] = get_args(PackedKind)
KINDS: dict[PackedKind, Kind] = {
    "int8": Scaled("int8", torch.int8),
    "q8_0": GGML_KINDS["Q8_0"],
    "q4_k": GGML_KINDS["Q4_K"],
    "float8": Scaled("float8_e4m3fn", torch.float8_e4m3fn),
}
# Numbers in a part of a Q4_K block, and its parts.
_PART, _PARTS = 32, 8
# Rows of blocks that are packed at a time: about twenty roundings of each are tried.
_BLOCKS = 4096


def pack(weight: Tensor, kind: PackedKind) -> QuantisedWeight:
    """Quantises a weight [rows, columns] of any float dtype.

    Raises:
        ValueError: an unknown kind, or rows that are no whole blocks of it.
    """
    refuse_kind(kind)
    rows, columns = weight.shape
    packed_layout(kind, (rows, columns))
    return QuantisedWeight(KINDS[kind], (rows, columns), _PACKERS[kind](weight.detach().float()))


def refuse_kind(kind: str) -> None:
    """Raises a ValueError for a kind that is not written here."""
    if kind not in PACKED_KINDS:
        raise ValueError(f"quantize={kind!r}; allowed: {', '.join(PACKED_KINDS)}")


def packed_layout(kind: PackedKind, shape: tuple[int, int]) -> Layout:
    """Shape and dtype of the parts that :func:`pack` makes of a weight.

    Raises:
        ValueError: its rows are no whole blocks of the kind.
    """
    rows, columns = shape
    found = KINDS[kind]
    if isinstance(found, BlockKind):
        if columns % found.block:
            raise ValueError(
                f"rows of {columns} numbers are no whole blocks of {found.block}, as {kind} has them; take int8"
            )
        return {WEIGHT: ((rows, columns // found.block * found.size), torch.uint8)}
    if kind == "int8":
        return {WEIGHT: (shape, torch.int8), SCALE: ((rows, 1), torch.float32)}
    return {WEIGHT: (shape, torch.float8_e4m3fn), SCALE: ((), torch.float32)}


def unpacked(weight: Tensor) -> QuantisedWeight:
    """A weight as it is, in the form of a quantised one."""
    rows, columns = weight.shape
    return QuantisedWeight(Plain(weight.dtype), (rows, columns), {WEIGHT: weight.detach()})


def _int8(weight: Tensor) -> dict[str, Tensor]:
    packed = Int8Weight.of(weight)
    return {WEIGHT: packed.values, SCALE: packed.scale[:, None]}


def _float8(weight: Tensor) -> dict[str, Tensor]:
    dtype = torch.float8_e4m3fn
    scale = (weight.abs().max() / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)
    return {WEIGHT: (weight / scale).to(dtype), SCALE: scale}


def _q8_0(weight: Tensor) -> dict[str, Tensor]:
    """As ggml packs it, to the bit: halves are rounded away from zero."""
    blocks = weight.reshape(-1, 32)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    inverse = torch.where(scale == 0, 0, 1 / scale)
    values = blocks * inverse
    size = values.abs()
    whole = size.floor()
    values = values.sign() * (whole + (2 * (size - whole)).floor())
    packed = torch.cat((scale.half().view(torch.uint8), values.to(torch.int8).view(torch.uint8)), dim=1)
    return {WEIGHT: packed.reshape(len(weight), -1)}


# ---------------------------------------------------------------------------------------------------------------------
# Q4_K
# ---------------------------------------------------------------------------------------------------------------------


def _q4_k(weight: Tensor) -> dict[str, Tensor]:
    parts = weight.reshape(-1, _PARTS, _PART)
    packed = torch.cat([_q4_k_blocks(some) for some in parts.split(_BLOCKS)])
    return {WEIGHT: packed.reshape(len(weight), -1)}


def _q4_k_blocks(parts: Tensor) -> Tensor:
    """[blocks, 8, 32] to [blocks, 144] bytes."""
    scale, minimum = _scale_and_minimum(parts)
    # Scales and minima of 6 bits, under a float16 number for each.
    over = [_over(values) for values in (scale, minimum)]
    small = [_rounded(values, number, 63) for values, number in zip((scale, minimum), over, strict=True)]
    fine, low = (number.float() * whole for number, whole in zip(over, small, strict=True))
    values = _rounded(parts + low[:, :, None], fine[:, :, None], 15).to(torch.uint8)
    pairs = values.reshape(len(parts), _PARTS // 2, 2, _PART)
    nibbles = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(parts), -1)
    halves = [number.half().view(torch.uint8) for number in over]
    return torch.cat((*halves, _six_bits(*(whole.to(torch.uint8) for whole in small)), nibbles), dim=1)


def _over(values: Tensor) -> Tensor:
    """The float16 number that 63 steps of are the largest of some values: [blocks, 8] to [blocks, 1]."""
    return (values.amax(dim=1, keepdim=True) / 63).half()


def _rounded(values: Tensor, step: Tensor, most: int) -> Tensor:
    """How many steps there are in each value, from 0 to ``most``."""
    step = step.float()
    return torch.where(step > 0, values / step, 0).round().clamp(0, most)


def _scale_and_minimum(parts: Tensor) -> tuple[Tensor, Tensor]:
    """For each part, the scale and what is taken off, so that the squares of 16 steps' errors are least.

    Larger numbers count more: they carry more of a product. Every rounding that is tried gives the scale and minimum
    that fit it best, and the best of all is taken.
    """
    importance = parts.square().mean(dim=2, keepdim=True).sqrt() + parts.abs()
    least = parts.amin(dim=2, keepdim=True).clamp(max=0)
    width = (parts.amax(dim=2, keepdim=True) - least).clamp(min=torch.finfo(torch.float32).tiny)
    best_scale, best_low = width / 15, -least
    best = _error(parts, importance, best_scale, best_low)
    total = importance.sum(dim=2, keepdim=True)
    weighted = (importance * parts).sum(dim=2, keepdim=True)
    for step in range(21):
        steps = ((parts - least) * ((14 + step * 0.1) / width)).round().clamp(0, 15)
        along = (importance * steps).sum(dim=2, keepdim=True)
        square = (importance * steps.square()).sum(dim=2, keepdim=True)
        product = (importance * steps * parts).sum(dim=2, keepdim=True)
        spread = total * square - along.square()
        scale = (total * product - along * weighted) / spread
        low = -(square * weighted - along * product) / spread
        # Nothing can be added: what is taken off is at least zero.
        scale, low = torch.where(low < 0, product / square, scale), low.clamp(min=0)
        error = _error(parts, importance, scale, low)
        better = error < best  # false where a division had no result
        best = torch.where(better, error, best)
        best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, low, best_low)
    return best_scale[:, :, 0], best_low[:, :, 0]


def _error(parts: Tensor, importance: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    values = ((parts + low) / scale).round().clamp(0, 15) * scale - low
    error = (importance * (values - parts).square()).sum(dim=2, keepdim=True)
    return torch.where(scale > 0, error, torch.inf)


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """The 12 bytes of 8 scales and 8 minima: [blocks, 8] twice to [blocks, 12]."""
    first, last = scales.split(4, dim=1)
    first_low, last_low = minima.split(4, dim=1)
    upper = (first | (last & 48) << 2, first_low | (last_low & 48) << 2)
    return torch.cat((*upper, (last & 15) | last_low << 4), dim=1)


_PACKERS: dict[PackedKind, Callable[[Tensor], dict[str, Tensor]]] = {
    "int8": _int8,
    "q8_0": _q8_0,
    "q4_k": _q4_k,
    "float8": _float8,
}
