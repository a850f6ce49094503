"""The kernels for CUDA as the runner of a stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.cuda.card import card_of
from nai_t5_core.backends.cuda.card_choice import choice_for
from nai_t5_core.backends.cuda.encoder import CudaEncoder, ProductsChoice, encoder_beside, unproven_on
from nai_t5_core.backends.cuda.refusals import refuses
from nai_t5_core.backends.held import is_in_8_bits
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.packing import PaddingPolicy


class CudaRunner:
    """Encodes by the kernels where they can, see :func:`nai_t5_core.backends.cuda.encoder.cuda_encoder`.

    They cannot while a live LoRA or another adapter is in the stack, or gradients are recorded. If the stack was moved
    to another device, a new encoder is made.

    Args:
        eager, products, record_at: see :func:`nai_t5_core.backends.cuda.encoder.cuda_encoder`.
        kinds: those of quantised weights that the kernels read, by name, to tell users.
    """

    def __init__(
        self,
        eager: bool = False,
        products: ProductsChoice = "auto",
        record_at: int = 1,
        kinds: Sequence[str] = (),
    ) -> None:
        self.eager, self.products, self.record_at = eager, products, record_at
        self.name = "kernels for CUDA" + (f", {' and '.join(kinds)} weights" if kinds else "")
        self._encoder: CudaEncoder | None = None

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
        encoder = None if input_ids is None or inputs_embeds is not None else self._encoder_of(stack)
        if encoder is None or input_ids is None:
            return None
        encoded = encoder.encode_unless_refused(input_ids, attention_mask, padding, extra_pad)
        # Reading ``finite`` waits for the device. If it is 0, the modules encode again, and the guard finds the cause.
        if encoded is None or (stack.guard is not None and not bool(encoded.finite)):
            return None
        return encoded.hidden

    @torch.no_grad()
    def refusal(self, stack: T5EncoderStack) -> str | None:
        """See :class:`nai_t5_core.model.encoder.StackRunner`."""
        return refuses(stack) or (unproven_on(stack.device) if self.products == "auto" else None)

    def describe(self, stack: T5EncoderStack) -> str:
        """With where the choice of products and attention comes from."""
        card = card_of(stack.device)
        if card is None or self.products != "auto":
            return self.name
        choice = choice_for(card)
        rows = choice.int8_inputs_from if is_in_8_bits(stack) else None
        inputs = "" if rows is None else f", inputs in 8 bits from {rows} tokens on"
        return f"{self.name}{inputs}, {choice.origin}"

    def _encoder_of(self, stack: T5EncoderStack) -> CudaEncoder | None:
        if self._encoder is None or self._encoder.device != stack.device:
            self._encoder = None
            if self.refusal(stack) is None:
                self._encoder = encoder_beside(stack, self.eager, self.products, self.record_at)
        return self._encoder

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None}
