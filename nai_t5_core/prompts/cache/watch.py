"""Whether an encoder still computes what its settings say, whoever has it in hands."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nai_t5_core.model.block import ModulesRecord
from nai_t5_core.model.encoder import T5EncoderStack


class Watch:
    """Sees every change of a loaded encoder that is not told to its ``alterations``.

    Replaced modules and weights, weights that were moved or written to, hooks, and another way to compute them. It does
    not see what is written through ``tensor.data`` or past torch.

    Attributes:
        is_known: False for good once a change was not told.
    """

    def __init__(self, stack: T5EncoderStack) -> None:
        self._stack = stack
        self.is_known = True
        self.renew()
        stack.alterations.watchers.append(self)

    def look(self) -> None:
        """Looks whether there was such a change."""
        self.is_known = self.is_known and self._seen.is_same and self._state == self._present_state()

    def renew(self) -> None:
        """Takes what is now for what is known, after a change that was told."""
        self._modules = list(self._stack.modules())
        self._seen = ModulesRecord(self._modules)
        tables = [table for module in self._modules for table in (module._parameters, module._buffers)]
        self._tensors = [tensor for table in tables for tensor in table.values() if tensor is not None]
        self._state = self._present_state()

    def _present_state(self) -> tuple[Any, ...]:
        stack = self._stack
        blocks: Any = stack.encoder.block
        runners = [id(block.runner) for block in blocks]
        how = (stack.attention, stack.training, id(stack.runner))
        return how, runners, list(map(_version, self._tensors))


def _version(tensor: Tensor) -> int:
    """How often it was written to; tensors made in inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version
