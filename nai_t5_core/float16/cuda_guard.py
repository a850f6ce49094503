"""The kernels' encoder under guard: what it gives is finite, and what it cannot run is run by the stack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.cuda.encoder import CudaEncoder
from nai_t5_core.float16.guard import encode_guarded


class GuardedCudaEncoder:
    """Called as :func:`nai_t5_core.float16.guard.encode_guarded` is, with the same promise, by the kernels where they
    can.

    They cannot while a live LoRA or another adapter is in the stack, under gradients, or after the stack was moved; and
    prompts whose mask has holes go to the stack as well.
    """

    def __init__(self, encoder: CudaEncoder) -> None:
        self.encoder = encoder

    @torch.no_grad()
    def refusal(self) -> str | None:
        """Why the stack would encode in their place now; None if they can."""
        return self.encoder.refusal()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Hidden states [batch, length, d_model]; see :meth:`nai_t5_core.model.encoder.T5EncoderStack.forward`.

        Raises:
            NotFiniteError: see :func:`nai_t5_core.float16.guard.encode_guarded`.
        """
        encoded = self.encoder.encode_unless_refused(input_ids, attention_mask, **options)
        if encoded is not None and bool(encoded.finite):
            return encoded.hidden
        # Where a value is not finite, the guard runs the batch again to find out which.
        return encode_guarded(self.encoder.stack, input_ids, attention_mask, **options)
