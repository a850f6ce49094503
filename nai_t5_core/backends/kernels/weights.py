"""Weights as the kernels take them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.kernels.addresses import address, address_if_any, sizes
from nai_t5_core.backends.kernels.build import best_set, missing_for_kernels
from nai_t5_core.backends.kernels.interface import Matrix, kernels
from nai_t5_core.backends.kernels.sets import InstructionSet

# Numbers of the formats in kernels.h.
WEIGHT_FORMATS = {
    torch.bfloat16: 0,
    torch.float16: 1,
    torch.float32: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
}
_WITH_SCALES = {torch.int8: 5}
_PANELS = 6
_FORMAT_DTYPES = {number: dtype for dtype, number in [*WEIGHT_FORMATS.items(), *_WITH_SCALES.items()]}


@dataclass(frozen=True)
class KernelWeight:
    """A weight as the kernels take it: [columns, depth] as it lies in memory, or a copy in panels.

    A gated weight has the columns of the gate and then those of up. ``dtype`` is that of the activations, and products
    are computed in it. ``kept`` is that of the weight's numbers in panels; a plain weight in another is rounded to it
    in every call. Panels save that, and rearranging the weight. Weights in 8 bits have the ``scales`` of their columns;
    their products are computed in 8 bits, and from panels only.
    """

    values: Tensor
    format: int
    columns: int
    depth: int
    dtype: torch.dtype
    kept: torch.dtype
    instructions: InstructionSet
    is_gated: bool = False
    scales: Tensor | None = None

    @classmethod
    def plain(
        cls,
        weight: Tensor,
        dtype: torch.dtype,
        is_gated: bool = False,
        scales: Tensor | None = None,
        instructions: InstructionSet | None = None,
    ) -> KernelWeight:
        """A contiguous weight [columns, depth] of even depth, and even in columns if it is gated.

        Args:
            weight: in a dtype of :data:`WEIGHT_FORMATS`; or int8, of a depth that is a multiple of 4.
            dtype: of the activations, one that the instruction set stores them in: float32, on AVX512 also bfloat16.
            scales: [columns] float32, of a weight in int8: what a unit is worth.
            instructions: what to compute with; by default the best that this processor has.
        """
        instructions = or_best(instructions)
        if dtype not in instructions.stored.values():
            known = " or ".join(_short(known) for known in dict.fromkeys(instructions.stored.values()))
            raise ValueError(f"the kernels for {instructions.title} compute in {known}, and not in {dtype}")
        columns, depth = sizes(weight)
        formats, unit = (WEIGHT_FORMATS, 2) if scales is None else (_WITH_SCALES, 4)
        is_even = depth % unit == 0 and not (is_gated and columns % 2)
        if weight.dtype not in formats or not weight.is_contiguous() or not is_even or not weight.numel():
            raise ValueError(
                "the kernels take contiguous weights of even sizes, not 0, in bfloat16, float16, float32 or float8, or "
                f"in int8 with scales and a depth that is a multiple of 4; got {weight.dtype} {list(weight.shape)}"
            )
        own_scales = None if scales is None else scales.detach().float().contiguous()
        kept = instructions.kept(weight.dtype, dtype)
        values, number = weight.detach(), formats[weight.dtype]
        made = cls(values, number, columns, depth, dtype, kept, instructions, is_gated, own_scales)
        made.matrix()  # refuses what is left to refuse
        return made

    @property
    def is_in_panels(self) -> bool:
        return self.format == _PANELS

    def in_panels(self) -> KernelWeight:
        """A copy in panels; itself where it is in panels already."""
        if self.is_in_panels:
            return self
        matrix = self.matrix()
        steps = self._panel_steps
        panels = torch.empty(steps, dtype=torch.int32)
        kernels(self.instructions).t5_to_panels(ctypes.byref(matrix), address(panels, torch.int32, steps))
        return replace(self, values=panels, format=_PANELS)

    def original(self) -> Tensor:
        """[columns, depth]; panels give it in ``kept``."""
        if not self.is_in_panels:
            return self.values
        weight = torch.empty(self.columns, self.depth, dtype=self.kept)
        place = address(weight, self.kept, self.columns, self.depth)
        kernels(self.instructions).t5_from_panels(ctypes.byref(self.matrix()), place)
        return weight

    def check_form(self) -> None:
        """Raises ValueError where this can only be computed from panels."""
        if self.scales is not None and not self.is_in_panels:
            raise ValueError("a weight in int8 must be in panels before it is used: call in_panels()")

    def matrix(self) -> Matrix:
        """What the kernels are told; it is of no use once the tensors are gone.

        Raises:
            ValueError: the tensors are not, or no longer, what they are to be.
        """
        if self.is_in_panels:
            return self._panels
        matrix = self._sizes()
        matrix.scales = address_if_any(self.scales, torch.float32, self.columns)
        dtype = _FORMAT_DTYPES[self.format]
        matrix.values = address(self.values, dtype, self.columns, self.depth, anywhere=True)
        return matrix

    @cached_property
    def _panels(self) -> Matrix:
        """Made once: panels are nobody else's, so that they stay where they are."""
        matrix = self._sizes()
        matrix.scales = address_if_any(self.scales, torch.float32, self.columns)
        matrix.values = address(self.values, torch.int32, self._panel_steps)
        return matrix

    def __getstate__(self) -> dict[str, Any]:
        # A copy has its panels in another place.
        return {name: value for name, value in self.__dict__.items() if name != "_panels"}

    def _sizes(self) -> Matrix:
        kind = self.instructions.kinds[self.kept, self.dtype]
        return Matrix(None, None, self.columns, self.depth, self.format, self.is_gated, kind)

    @cached_property
    def _panel_steps(self) -> int:
        steps: int = kernels(self.instructions).t5_panel_steps(ctypes.byref(self._sizes()))
        return steps


def or_best(instructions: InstructionSet | None) -> InstructionSet:
    """The given set, or the best that this processor has."""
    if (found := instructions or best_set()) is None:
        raise ValueError(f"there are no kernels for this machine: {missing_for_kernels()}")
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
