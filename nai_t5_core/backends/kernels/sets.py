"""The instruction sets that there are kernels for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nai_t5_core.backends.kernels import compilers
from nai_t5_core.backends.kernels.compilers import Recipe


@dataclass(frozen=True, eq=False)
class InstructionSet:
    """What a processor may have, and what the kernels do with it.

    Attributes:
        recipe: what the kernels are compiled from.
        title: as it is told.
        needs: what the processor must have, by the names that Linux has for it.
        lacking: a sentence for a processor that has not all of them.
        stored: what activations are stored in, for each dtype that a model may have.
        kinds: the number that C++ has for what products are computed in (see kinds.h in the folder), by the dtypes of
            weights in panels and of activations.
    """

    recipe: Recipe
    title: str
    needs: frozenset[str]
    lacking: str
    stored: Mapping[torch.dtype, torch.dtype]
    kinds: Mapping[tuple[torch.dtype, torch.dtype], int]

    @property
    def name(self) -> str:
        """As users name it."""
        return self.recipe.name

    @property
    def stores_bfloat16(self) -> bool:
        """Whether activations of a model in bfloat16 are kept in it, for which the processor then has products."""
        return self.stored[torch.bfloat16] == torch.bfloat16

    def kept(self, weight: torch.dtype, activations: torch.dtype) -> torch.dtype:
        """The dtype of a weight's numbers in panels: its own if there is a kind for it, else that of activations.

        Where activations are in float32 and float16 is multiplied as it is, float8 becomes float16, which holds it.
        """
        if (weight, activations) in self.kinds:
            return weight
        is_small = weight.itemsize == 1 and (torch.float16, activations) in self.kinds
        return torch.float16 if is_small else activations

    def __reduce__(self) -> Any:
        return named, (self.name,)


_STORED = {torch.bfloat16: torch.bfloat16, torch.float32: torch.float32}
_AVX512_KINDS = {
    (torch.bfloat16, torch.bfloat16): 0,
    (torch.float32, torch.float32): 1,
    (torch.int8, torch.bfloat16): 2,
    (torch.int8, torch.float32): 3,
}
AVX512 = InstructionSet(
    recipe=compilers.AVX512,
    title="AVX512",
    needs=frozenset({"avx512_bf16", "avx512_vnni"}),
    lacking="this processor has no AVX512-BF16, or no AVX512-VNNI",
    stored=_STORED,
    kinds=_AVX512_KINDS,
)
AMX = InstructionSet(
    recipe=compilers.AMX,
    title="AMX",
    needs=AVX512.needs | {"amx_tile", "amx_bf16", "amx_int8"},
    lacking="this processor has no AMX for bfloat16 and bytes, or no AVX512-BF16 beside it",
    stored=_STORED,
    kinds=_AVX512_KINDS,
)
_IN_FLOAT32 = dict.fromkeys((torch.bfloat16, torch.float16, torch.float32), torch.float32)
_AVX2_KINDS = {
    (torch.float32, torch.float32): 1,
    (torch.int8, torch.float32): 3,
    (torch.bfloat16, torch.float32): 4,
    (torch.float16, torch.float32): 5,
}
AVX2 = InstructionSet(
    recipe=compilers.AVX2,
    title="AVX2",
    needs=frozenset({"avx2", "fma", "f16c"}),
    lacking="this processor has no AVX2, or no FMA or F16C beside it",
    stored=_IN_FLOAT32,
    kinds=_AVX2_KINDS,
)
AVX2_VNNI = InstructionSet(
    recipe=compilers.AVX2_VNNI,
    title="AVX2-VNNI",
    needs=AVX2.needs | {"avx_vnni"},
    lacking="this processor has no AVX-VNNI, or no AVX2, FMA or F16C beside it",
    stored=_IN_FLOAT32,
    kinds=_AVX2_KINDS,
)

# What is chosen from where nobody names a set, the best first. AMX is not among them, since it was not measured.
CHOSEN = (AVX512, AVX2_VNNI, AVX2)
SETS = (AMX, *CHOSEN)


def named(name: str) -> InstructionSet:
    """The set of this name."""
    return next(instructions for instructions in SETS if instructions.name == name)
