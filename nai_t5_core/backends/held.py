"""Projections whose weights a backend holds, prepacked or in 8 bits.

A backend that rearranges or quantises weights replaces each projection by a :class:`HeldLinear` of the same name, which
can be called, hooked into, saved and asked for its weight as the original could.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nai_t5_core.model.block import Block, Lending, operations_are_watched
from nai_t5_core.model.fixed_weights import FixedWeights


class Form(Protocol):
    """A weight [out_features, in_features], prepacked or in 8 bits; a callable form multiplies its argument by it.

    Attributes:
        in_8_bits: whether it is quantised, and no longer the weight that was given.
    """

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def in_8_bits(self) -> bool: ...

    def original(self) -> Any:
        """The weight as it is kept: a tensor, or an :class:`nai_t5_core.backends.int8_weight.Int8Weight`."""
        ...


class HeldLinear(FixedWeights):
    """A projection whose weight a backend holds. The weight is no parameter and gets no gradient.

    Args:
        forms: what holds the weight; several forms hold consecutive rows of it.
        part, parts: with ``parts`` above 1 there is one form, which several projections share, and this projection's
            weight is part number ``part`` of its rows, split into ``parts`` equal parts.
        dtype: the compute dtype that the forms were made for; None where they serve every dtype.
    """

    def __init__(self, forms: Sequence[Form], part: int = 0, parts: int = 1, dtype: torch.dtype | None = None) -> None:
        super().__init__(dtype)
        self.forms = tuple(forms)
        self.part, self.parts = part, parts
        self.in_features = self.forms[0].in_features
        self.out_features = sum(form.out_features for form in self.forms) // parts

    def forward(self, x: Tensor) -> Tensor:
        """[…, in_features] to […, out_features]; gradients of ``x`` are recorded.

        Raises:
            ValueError: ``x`` is not on the CPU.
        """
        if not x.is_cpu:
            raise ValueError(
                f"the model is prepacked or quantised for the CPU, and was called on {x.device}: what moves or "
                "offloads it leaves its weights where they are; switch that off, or load the model anew"
            )
        if self._multiplies and not self._torch_is_needed(x):
            products = [form(x) for form in self.forms]  # type: ignore[operator]
            return products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        return F.linear(x, self.plain().to(x.dtype))

    def plain(self) -> Tensor:
        """The weight [out_features, in_features] in the dtype that the form keeps, or float32 for a form in 8 bits."""
        found = self.original()
        plain: Tensor = found if isinstance(found, Tensor) else found.plain()
        return plain

    def original(self) -> Any:
        """The weight as it is kept: a tensor, or an :class:`nai_t5_core.backends.int8_weight.Int8Weight`."""
        if self.parts > 1:
            return self.forms[0].original().chunk(self.parts)[self.part]
        weights = [form.original() for form in self.forms]
        if len(weights) == 1:
            return weights[0]
        return torch.cat(weights) if isinstance(weights[0], Tensor) else type(weights[0]).joined(weights)

    def plain_weight(self, like: Tensor) -> Tensor:
        """See :func:`nai_t5_core.model.plain_twin.plain_weight`."""
        return self.plain()

    @property
    def in_8_bits(self) -> bool:
        """Whether the weight is in 8 bits."""
        return any(form.in_8_bits for form in self.forms)

    @property
    def _multiplies(self) -> bool:
        return self.parts == 1 and callable(self.forms[0])

    @staticmethod
    def _torch_is_needed(x: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return False
        return (x.requires_grad and torch.is_grad_enabled()) or operations_are_watched()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.plain()

    def extra_repr(self) -> str:
        forms = ", ".join(dict.fromkeys(map(str, self.forms)))
        return f"in_features={self.in_features}, out_features={self.out_features}, {forms}"


@dataclass(eq=False)
class ByModules:
    """The runner of a block whose modules compute it, by projections that do so in a way of their own.

    Attributes:
        name: in which way.
    """

    name: str
    lending: Lending | None = None

    def __call__(self, block: Block, residual: Tensor, *attends_and_dtype: Any) -> Tensor | None:
        return None

    def attends(self, block: Block, dtype: torch.dtype) -> bool:
        return False

    def forget(self) -> None:
        """Nothing: it has found out nothing."""


def is_in_8_bits(model: nn.Module) -> bool:
    """Whether a model has a weight in 8 bits, from which the original weight cannot be had again."""
    return any(module.in_8_bits for module in model.modules() if isinstance(module, HeldLinear))


def original_weight(projection: nn.Module) -> Any:
    """The weight of a projection, plain or held by a backend: a tensor, or an 8-bit weight."""
    if isinstance(projection, HeldLinear):
        return projection.original()
    weight: Any = projection.weight
    return weight.detach()
