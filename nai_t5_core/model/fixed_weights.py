"""Modules whose weights are prepacked or in 8 bits, for one processor and dtype, and the operations they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FixedWeights(nn.Module):
    """A module whose weights are no parameters.

    The weights cannot be moved, cast, replaced or trained. Attempts are errors, since torch would silently skip them.

    Args:
        dtype: the compute dtype that the weights are for; None where they serve any.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        nn.Module.__init__(self)  # not super(): a subclass may have further bases
        self.fixed_dtype = dtype

    def refuse_change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Raises a ValueError if a change of all parameters would move or cast them."""
        now = torch.empty(0, dtype=self.fixed_dtype)
        then = change(now)
        if then.device != now.device or self.fixed_dtype not in (None, then.dtype):
            raise ValueError(
                f"the model is prepacked or quantised for the CPU, and cannot be moved or cast to "
                f"{then.dtype} on {then.device}; load it anew, there and in that dtype"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedWeights:
        self.refuse_change(fn)
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        raise ValueError("the model is prepacked or quantised for the CPU, and takes no other weights; load it anew")


def refuse_change(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Raises a ValueError if a change of all parameters would move or cast fixed weights somewhere in a model.

    Models call this before a change, since torch changes one module after the other and would stop half-way.
    """
    for module in model.modules():
        if isinstance(module, FixedWeights):
            module.refuse_change(change)


def has_fixed_weights(model: nn.Module) -> bool:
    """Whether a model has weights that are prepacked or in 8 bits."""
    return any(isinstance(module, FixedWeights) for module in model.modules())
