"""Weights as the kernels take them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.kernels.addresses import address, sizes
from nai_t5_core.backends.kernels.build import best_set, missing_for_kernels
from nai_t5_core.backends.kernels.interface import Matrix, kernels
from nai_t5_core.backends.kernels.pieces import WEIGHT_FORMATS, WeightPiece, described
from nai_t5_core.backends.kernels.sets import InstructionSet


@dataclass(frozen=True)
class KernelWeight:
    """A weight [columns, depth] as the kernels take it: in pieces as it lies in memory, or a copy in panels.

    A gated weight has the columns of the gate and then those of up. ``dtype`` is that of the activations, and products
    are computed in it. ``kept`` is that of the weight's numbers in panels; pieces of others are rounded to it in every
    call. Panels save that, and rearranging the weight. Products ``in_8_bits`` are computed from panels only. Where one
    ``stays_in_place``, its holder sees to it that no tensor is moved; those of others are looked for in every call.
    """

    pieces: tuple[WeightPiece, ...]
    columns: int
    depth: int
    dtype: torch.dtype
    kept: torch.dtype
    instructions: InstructionSet
    is_gated: bool = False
    panels: Tensor | None = None
    scales: Tensor | None = None
    stays_in_place: bool = False

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
        _refuse_dtype(dtype, instructions)
        columns, depth = sizes(weight)
        formats, unit = (WEIGHT_FORMATS, 2) if scales is None else ((torch.int8,), 4)
        is_even = depth % unit == 0 and not (is_gated and columns % 2)
        if weight.dtype not in formats or not weight.is_contiguous() or not is_even or not weight.numel():
            raise ValueError(
                "the kernels take contiguous weights of even sizes, not 0, in bfloat16, float16, float32 or float8, or "
                f"in int8 with scales and a depth that is a multiple of 4; got {weight.dtype} {list(weight.shape)}"
            )
        own_scales = None if scales is None else scales.detach().float().contiguous()
        kept = instructions.kept(weight.dtype, dtype)
        pieces = (WeightPiece(weight.detach(), columns, depth, scales=own_scales),)
        made = cls(pieces, columns, depth, dtype, kept, instructions, is_gated, scales=own_scales)
        made.matrix()  # refuses what is left to refuse
        return made

    @classmethod
    def of_pieces(
        cls,
        pieces: Sequence[WeightPiece],
        kept: torch.dtype,
        dtype: torch.dtype,
        is_gated: bool = False,
        instructions: InstructionSet | None = None,
    ) -> KernelWeight:
        """A weight in pieces of one depth, an even one, that stand one above the other; their tensors must stay.

        Args:
            kept: what their numbers are rounded to, once.
            dtype, is_gated, instructions: as for :meth:`plain`.
        """
        instructions = or_best(instructions)
        _refuse_dtype(dtype, instructions)
        if (kept, dtype) not in instructions.kinds or kept == torch.int8:
            raise ValueError(f"the kernels for {instructions.title} do not multiply {kept} beside {dtype}")
        columns, depths = _columns_of(pieces), {piece.depth for piece in pieces}
        depth = max(depths, default=0)
        if len(depths) != 1 or not columns or not depth or depth % 2:
            raise ValueError(
                f"the kernels take pieces of one even depth, not 0; got {sorted(depths)}, {columns} columns"
            )
        if is_gated and columns % 2:
            raise ValueError(f"a gated weight has as many columns of the gate as of up; got {columns}")
        made = cls(tuple(pieces), columns, depth, dtype, kept, instructions, is_gated, stays_in_place=True)
        made.matrix()
        return made

    @property
    def is_in_panels(self) -> bool:
        return self.panels is not None

    def in_panels(self) -> KernelWeight:
        """A copy in panels; itself where it is in panels already."""
        if self.is_in_panels:
            return self
        matrix = self.matrix()
        steps = self._panel_steps
        panels = torch.empty(steps, dtype=torch.int32, device="cpu")
        kernels(self.instructions).t5_to_panels(ctypes.byref(matrix), address(panels, torch.int32, steps))
        return replace(self, pieces=(), panels=panels, stays_in_place=True)

    def original(self) -> Tensor:
        """[columns, depth]; in ``kept`` where it is in panels, or more than numbers of a dtype."""
        if not self.is_in_panels and len(self.pieces) == 1 and (self.pieces[0].is_plain or self.scales is not None):
            return self.pieces[0].values
        weight = torch.empty(self.columns, self.depth, dtype=self.kept, device="cpu")
        place = address(weight, self.kept, self.columns, self.depth)
        packed = self.in_panels()  # must stay until they are read
        kernels(self.instructions).t5_from_panels(ctypes.byref(packed.matrix()), place)
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
        return self._told if self.stays_in_place else self._described()

    @cached_property
    def _told(self) -> Matrix:
        """Made once."""
        return self._described()

    def _described(self) -> Matrix:
        matrix = self._sizes()
        if self.panels is not None:
            matrix.panels = address(self.panels, torch.int32, self._panel_steps)
        else:
            if {piece.depth for piece in self.pieces} != {self.depth} or self.columns != _columns_of(self.pieces):
                raise ValueError(f"the pieces of a weight are not, or no longer, [{self.columns}, {self.depth}]")
            matrix.pieces, matrix.piece_count = described(self.pieces), len(self.pieces)
        return matrix

    def __getstate__(self) -> dict[str, Any]:
        # A copy has its tensors in another place.
        return {name: value for name, value in self.__dict__.items() if name != "_told"}

    def _sizes(self) -> Matrix:
        kind = self.instructions.kinds[self.kept, self.dtype]
        return Matrix(None, None, 0, self.columns, self.depth, self.is_gated, kind)

    @cached_property
    def _panel_steps(self) -> int:
        steps: int = kernels(self.instructions).t5_panel_steps(ctypes.byref(self._sizes()))
        return steps


def or_best(instructions: InstructionSet | None) -> InstructionSet:
    """The given set, or the best that this processor has."""
    if (found := instructions or best_set()) is None:
        raise ValueError(f"there are no kernels for this machine: {missing_for_kernels()}")
    return found


def _columns_of(pieces: Sequence[WeightPiece]) -> int:
    return sum(piece.columns for piece in pieces)


def _refuse_dtype(dtype: torch.dtype, instructions: InstructionSet) -> None:
    if dtype not in instructions.stored.values():
        known = " or ".join(_short(known) for known in dict.fromkeys(instructions.stored.values()))
        raise ValueError(f"the kernels for {instructions.title} compute in {known}, and not in {dtype}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
