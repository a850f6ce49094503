"""GGUF's kinds in blocks of 32 numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from nai_t5_core.backends.quantised.blocks import BlockKind, fifth_bits, half, nibbles, uneven


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8) * half(blocks, 0)


def _q4_0(blocks: Tensor) -> Tensor:
    return (nibbles(blocks[:, 2:], 16).view(torch.int8) - 8) * half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return (nibbles(blocks[:, 4:], 16) * half(blocks, 0)).add_(half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    values = nibbles(blocks[:, 6:], 16) | fifth_bits(blocks[:, 2:6])
    return (values.view(torch.int8) - 16) * half(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    values = nibbles(blocks[:, 8:], 16) | fifth_bits(blocks[:, 4:8])
    return (values * half(blocks, 0)).add_(half(blocks, 2))


def _iq4_nl(blocks: Tensor) -> Tensor:
    return uneven(nibbles(blocks[:, 2:], 16)).mul_(half(blocks, 0))


KINDS_OF_32 = {
    kind.name: kind
    for kind in (
        BlockKind("Q8_0", 32, 34, (0,), _q8_0),
        BlockKind("Q5_1", 32, 24, (0, 2), _q5_1),
        BlockKind("Q5_0", 32, 22, (0,), _q5_0),
        BlockKind("Q4_1", 32, 20, (0, 2), _q4_1),
        BlockKind("Q4_0", 32, 18, (0,), _q4_0),
        BlockKind("IQ4_NL", 32, 18, (0,), _iq4_nl),
    )
}
