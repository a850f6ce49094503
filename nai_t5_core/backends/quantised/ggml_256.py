"""GGUF's kinds in blocks of 256 numbers, whose 8 or 16 parts have scales of a few bits under one or two of float16."""

from __future__ import annotations

import torch
from torch import Tensor

from nai_t5_core.backends.quantised.blocks import BlockKind, half, nibbles, uneven
from nai_t5_core.backends.quantised.kinds import there

_BLOCK = 256
_PAIRS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
_BITS = torch.arange(8, dtype=torch.uint8)


def _pairs(packed: Tensor, width: int) -> Tensor:
    """2 bits each: of every ``width`` bytes the lowest two bits, then the next two, …: [blocks, bytes] to 4 times."""
    groups = packed.reshape(len(packed), -1, 1, width)
    return ((groups >> there(_PAIRS, packed.device)[:, None]) & 3).reshape(len(packed), -1)


def _bits(packed: Tensor) -> Tensor:
    """One bit each: of all 32 bytes the lowest bit, then the next, …: [blocks, 32] to [blocks, 256]."""
    return ((packed[:, None, :] >> there(_BITS, packed.device)[:, None]) & 1).reshape(len(packed), -1)


def _scaled(values: Tensor, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
    """Numbers of equal parts [blocks, 256], times the scale of each part [blocks, parts], less its minimum."""
    parts = values.reshape(len(values), scale.shape[1], -1) * scale[:, :, None]
    if minimum is not None:
        parts.sub_(minimum[:, :, None])
    return parts.reshape(len(values), -1)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """8 scales and 8 minima of 6 bits each, of 12 bytes: [blocks, 12] to twice [blocks, 8].

    The first four of each have a byte, in whose two upper bits are those of the others; the last four bytes have the
    lower halves of these, scales below minima.
    """
    scale, minimum, both = packed.split(4, dim=1)
    scales = torch.cat((scale & 63, (both & 15) | ((scale >> 2) & 48)), dim=1)
    minima = torch.cat((minimum & 63, (both >> 4) | ((minimum >> 2) & 48)), dim=1)
    return scales, minima


def _q2_k(blocks: Tensor) -> Tensor:
    both = blocks[:, :16]
    scale, minimum = half(blocks, 80) * (both & 15), half(blocks, 82) * (both >> 4)
    return _scaled(_pairs(blocks[:, 16:80], 32), scale, minimum)


def _q3_k(blocks: Tensor) -> Tensor:
    """The mask of the third bit comes first; where it is not set, 4 is taken off. Scales are 6 bits from −32 on."""
    values = _pairs(blocks[:, 32:96], 32) | (_bits(blocks[:, :32]) << 2)
    scales = nibbles(blocks[:, 96:104], 8) | (_pairs(blocks[:, 104:108], 4) << 4)
    return _scaled(values.view(torch.int8) - 4, half(blocks, 108) * (scales.view(torch.int8) - 32))


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _six_bits(blocks[:, 4:16])
    return _scaled(nibbles(blocks[:, 16:], 32), half(blocks, 0) * scales, half(blocks, 2) * minima)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _six_bits(blocks[:, 4:16])
    values = nibbles(blocks[:, 48:], 32) | (_bits(blocks[:, 16:48]) << 4)
    return _scaled(values, half(blocks, 0) * scales, half(blocks, 2) * minima)


def _q6_k(blocks: Tensor) -> Tensor:
    values = nibbles(blocks[:, :128], 64) | (_pairs(blocks[:, 128:192], 32) << 4)
    return _scaled(values.view(torch.int8) - 32, half(blocks, 208) * blocks[:, 192:208].view(torch.int8))


def _iq4_xs(blocks: Tensor) -> Tensor:
    """Scales of 6 bits from −32 on: the upper two bits of all 8 in two bytes, the lower four in four."""
    lower = blocks[:, 4:8]
    lower = torch.stack((lower & 15, lower >> 4), dim=2).reshape(len(blocks), -1)
    upper = ((blocks[:, 2:4, None] >> there(_PAIRS, blocks.device)) & 3).reshape(len(blocks), -1)
    scales = (lower | (upper << 4)).view(torch.int8) - 32
    return _scaled(uneven(nibbles(blocks[:, 8:], 16)), half(blocks, 0) * scales)


KINDS_OF_256 = {
    kind.name: kind
    for kind in (
        BlockKind("Q6_K", _BLOCK, 210, (208,), _q6_k),
        BlockKind("Q5_K", _BLOCK, 176, (0, 2), _q5_k),
        BlockKind("Q4_K", _BLOCK, 144, (0, 2), _q4_k),
        BlockKind("Q3_K", _BLOCK, 110, (108,), _q3_k),
        BlockKind("Q2_K", _BLOCK, 84, (80, 82), _q2_k),
        BlockKind("IQ4_XS", _BLOCK, 136, (0,), _iq4_xs),
    )
}
