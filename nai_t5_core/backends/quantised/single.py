"""Products of a projection by itself by our CPU kernels, which read its quantised weights as they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.kernels.build import prepare_kernels, set_to_use
from nai_t5_core.backends.kernels.calls import product
from nai_t5_core.backends.kernels.sets import InstructionSet
from nai_t5_core.backends.kernels.weights import KernelWeight
from nai_t5_core.backends.quantised.forms import QuantisedForm
from nai_t5_core.backends.quantised.pieces import is_here, is_read, piece_of
from nai_t5_core.model.block import operations_are_watched


@dataclass(frozen=True)
class _Told:
    """What the kernels were told of a weight, and of what; None where they cannot compute with it."""

    dtype: torch.dtype
    forms: Sequence[QuantisedForm]
    state: list[tuple[object, ...]]
    weight: KernelWeight | None


class KernelProduct:
    """A projection's product by the kernels. No number of a weight is kept, but the scales of its rows.

    Attributes:
        instructions: what to compute with; None: the best that this processor has, unless oneDNN has something better.
    """

    def __init__(self) -> None:
        self.instructions: InstructionSet | None = None
        self._told: _Told | None = None

    def __call__(self, x: Tensor, forms: Sequence[QuantisedForm]) -> Tensor | None:
        """The product with weights that stand one above the other, rounded once; nothing is recorded for gradients.

        Args:
            x: […, in_features].

        Returns:
            […, out_features] in the same dtype; None where torch has to compute it: of a kind or in a dtype that the
            kernels do not know, on another device, or where torch sees every operation.

        Raises:
            MemoryError: there is no memory for the activations.
        """
        if operations_are_watched() or type(x) not in (Tensor, torch.nn.Parameter) or not x.is_cpu:
            return None
        weight = self._weight(forms, x.dtype)
        # What does not fit is torch's to refuse.
        if weight is None or x.shape[-1:] != (weight.depth,):
            return None
        rows = x.detach().reshape(-1, weight.depth).to(weight.dtype).contiguous()
        return product(rows, weight).to(x.dtype).view(*x.shape[:-1], weight.columns)

    def use(self, instructions: InstructionSet | None) -> None:
        """Has this set compute from now on."""
        self.instructions = instructions
        self.forget()

    def forget(self) -> None:
        """Lets go of weights that were computed with."""
        self._told = None

    def _weight(self, forms: Sequence[QuantisedForm], dtype: torch.dtype) -> KernelWeight | None:
        state = [form.state for form in forms]
        told = self._told
        if told is None or told.dtype != dtype or told.state != state:
            # Replaced at once, so it does not matter which of the two another thread reads.
            self._told = told = _Told(dtype, forms, state, self._described(forms, dtype))
        return told.weight

    def _described(self, forms: Sequence[QuantisedForm], dtype: torch.dtype) -> KernelWeight | None:
        instructions = set_to_use(self.instructions)
        if instructions is None or dtype not in instructions.stored or not all(map(_can_be_read, forms)):
            return None
        if prepare_kernels(self.instructions) is not None or (instructions := set_to_use(self.instructions)) is None:
            return None
        stored = instructions.stored[dtype]
        return KernelWeight.of_pieces(list(map(piece_of, forms)), dtype, stored, instructions=instructions)

    def __getstate__(self) -> dict[str, Any]:
        return {"instructions": self.instructions, "_told": None}


def _can_be_read(form: QuantisedForm) -> bool:
    has_numbers = form.out_features > 0 and form.in_features > 0
    return is_read(form.weight.kind) and is_here(form) and form.in_features % 2 == 0 and has_numbers
