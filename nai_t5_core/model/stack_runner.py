"""The interface of what encodes in place of an encoder's modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from nai_t5_core.model.packing import PaddingPolicy

if TYPE_CHECKING:
    from nai_t5_core.model.encoder import T5EncoderStack


class StackRunner(Protocol):
    """What encodes a batch in place of a stack's modules. The stack holds it; it keeps no reference to the stack."""

    name: str

    def __call__(
        self,
        stack: T5EncoderStack,
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

    def refusal(self, stack: T5EncoderStack) -> str | None:
        """Why the modules encode in inference in place of this runner, as a sentence; None where the runner does."""
        ...

    def describe(self, stack: T5EncoderStack) -> str:
        """What it computes by, in words; its name, or more."""
        ...
