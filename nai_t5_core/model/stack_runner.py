"""The interface of what encodes in place of an encoder's modules."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from nai_t5_core.model.packing import PaddingPolicy


class StackRunner(Protocol):
    """What encodes a batch in place of the modules of a :class:`nai_t5_core.model.encoder.T5EncoderStack`.

    The stack holds it; it keeps no reference to the stack.
    """

    name: str

    def __call__(
        self,
        stack: Any,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        *,
        inputs_embeds: Tensor | None,
        padding: PaddingPolicy,
        extra_pad: int,
    ) -> Tensor | None:
        """As the stack's own call; None where the stack's modules have to encode.

        If the stack has a guard, the result is finite.
        """
        ...

    def refusal(self, stack: Any) -> str | None:
        """Why the modules encode in inference in place of this runner, as a sentence; None where the runner does."""
        ...

    def describe(self, stack: Any) -> str:
        """What it computes by, in words; its name, or more."""
        ...
