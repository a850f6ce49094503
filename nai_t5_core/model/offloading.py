"""The interface of what has a stack's weights rest elsewhere than where it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


def refuse_offloaded(model: nn.Module, what: str) -> None:
    """Raises a ValueError for an encoder whose layers are offloaded, whose blocks nothing else may compute.

    Args:
        what: was to be done to it, as a participle.
    """
    if getattr(model, "offload", None) is not None:
        raise ValueError(
            f"the encoder's layers are offloaded, and it cannot be {what}: load it anew without offload=True"
        )


class Offloading(Protocol):
    """Brings the weights of each layer for its work; they rest in the host's memory.

    Attributes:
        device: where the stack computes; None where its weights rest.
    """

    device: torch.device | None

    def move(self, stack: Any, change: Callable[[Tensor], Tensor]) -> None:
        """In place of a change of all parameters: they stay, and the stack computes elsewhere.

        Raises:
            ValueError: the change is no move.
        """
        ...

    def rows(self, table: nn.Module, ids: Tensor) -> Tensor:
        """Rows of the embedding table, where the stack computes: ids of any shape and device to [..., d_model]."""
        ...
