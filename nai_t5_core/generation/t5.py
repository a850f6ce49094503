"""The T5 that users load: a model with encoder, decoder and head that also generates text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.generation.generate import generate, stream
from nai_t5_core.generation.options import GenerationOptions
from nai_t5_core.model.decoder_attention import DecoderCache
from nai_t5_core.model.t5 import T5Model


class T5(T5Model):
    """A T5 with encoder, decoder and output head; arguments as for :class:`nai_t5_core.model.t5.T5Model`."""

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        cache: DecoderCache | None = None,
        **options: Any,
    ) -> Tensor:
        """Generates texts for a batch of prompts of different lengths; each text stops on its own.

        Args:
            input_ids, attention_mask: as for a call.
            generator: the random generator for sampling; by default torch's global one.
            cache: from :meth:`new_cache`, to reuse its memory; by default a new one for this call.
            options: fields of :class:`nai_t5_core.generation.options.GenerationOptions`, such as ``num_beams=4``.

        Returns:
            [prompts · num_return_sequences, new tokens] int64: what follows the start token and a forced start, with
            the end token, padded with the pad token.

        Raises:
            ValueError: options that do not go together, a cache of another size, logits that are not finite.
            TypeError: an unknown option.
        """
        chosen = GenerationOptions(**options).for_model(self.config)
        with self.turns.call():
            return generate(self, input_ids, attention_mask, chosen, generator, cache)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        cache: DecoderCache | None = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """As :meth:`generate`, but without beams, and one token at a time: int64 [prompts · num_return_sequences] each.

        Finished texts give the pad token; the iterator ends when all texts are finished.
        """
        chosen = GenerationOptions(**options).for_model(self.config)
        return stream(self, input_ids, attention_mask, chosen, generator, cache)
