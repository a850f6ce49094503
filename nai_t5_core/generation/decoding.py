"""The state of one generation, advanced step by step: the prompts' keys and values, and the cache of the texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nai_t5_core.model.attention import BIAS_ALIGNMENT, logit_scale
from nai_t5_core.model.decoder_attention import CrossMemory, DecoderCache, bias_line
from nai_t5_core.model.precision import all_finite
from nai_t5_core.model.t5 import T5Model


class NotFiniteLogitsError(ValueError):
    """The decoder gave NaN or infinity; the message says what may help."""


# On the CPU, oneDNN's products and torch's attention take longer for one row than for four.
_FEWEST_ROWS = 4


class Decoding:
    """Texts that grow token by token: [prompts, beams] of them, the beams of a prompt side by side.

    Args:
        model: in evaluation mode.
        memory: from :meth:`T5.read`.
        cache: from :meth:`T5.new_cache`; it is cleared.
        fixed_shapes: every step has the same shapes, so that a compiled decoder (``model.decoder.compile()``) is
            compiled once; it then attends to the whole cache at every step.

    Raises:
        ValueError: the cache is for another number of prompts, or another model.
    """

    def __init__(self, model: T5Model, memory: CrossMemory, cache: DecoderCache, fixed_shapes: bool = False) -> None:
        if cache.prompts != memory.prompts:
            raise ValueError(f"the cache is for {cache.prompts} prompts, and there are {memory.prompts}; make another")
        if not cache.fits(model.config, model.dtype, model.device):
            raise ValueError("the cache is for another model, dtype or device; make one by this model's new_cache()")
        cache.clear()
        self.model, self.memory, self.cache = model, memory, cache
        compiled = model.compiled_steps
        if compiled is not None:
            compiled.prepare(cache, memory)
        # Each step reads a multiple of this number of slots.
        smallest = 1 if model.device.type == "cpu" else BIAS_ALIGNMENT
        self._granularity = smallest if compiled is None else compiled.slots_at_once
        if fixed_shapes:
            self._granularity = cache.slots
        self._scale = logit_scale(model.config)
        is_lone_and_compiled = self.shape == (1, 1) and compiled is not None
        is_narrow = cache.beams == 1 and model.device.type == "cpu" and not is_lone_and_compiled
        self._copies = max(1, _FEWEST_ROWS // cache.prompts) if is_narrow else 1
        # Sharded weights are gathered into tensors that must not become inference tensors.
        is_spread = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        self._without_gradients = torch.no_grad if is_spread else torch.inference_mode
        tables = model.decoder.bias_tables(model.dtype)
        self._lines = [bias_line(table, cache.length) for table in tables]
        # Of the logits that were not asked about yet: bool tensors [] on the device.
        self._are_finite: list[Tensor] = []

    @property
    def shape(self) -> tuple[int, int]:
        """(prompts, beams)"""
        return self.cache.prompts, self.cache.beams

    def step(self, tokens: Tensor) -> Tensor:
        """Appends a token to every text: ids [prompts, beams] to the next token's logits [prompts, beams, vocab_size].

        Logits are float32 whatever the compute dtype, and inference tensors unless the model is sharded. Whether they
        are finite is not known before :meth:`ask`, since to look waits for the device.

        Raises:
            ValueError: the cache is full.
        """
        with self._without_gradients():
            logits = self._compute(tokens).float()
            self._are_finite.append(all_finite(logits))
        return logits

    def ask(self, *questions: Tensor) -> list[bool]:
        """What bool tensors [] on the device say; they come in one copy, for which the host waits once.

        Raises:
            NotFiniteLogitsError: a logit of the steps since the last call is not finite.
        """
        count, self._are_finite = len(self._are_finite), [*self._are_finite, *questions]
        answers: list[bool] = torch.stack(self._are_finite).to("cpu").tolist()
        self._are_finite = []
        if not all(answers[:count]):
            raise NotFiniteLogitsError(
                f"the decoder gives values that are not finite in {self.model.dtype}: the weights are damaged, or "
                "exceed its range; use bfloat16 or float32, give scales, or call generate_guarded"
            )
        return answers[count:]

    def begin(self, tokens: Sequence[int]) -> Tensor:
        """Gives every text the same beginning, and returns the next token's logits as :meth:`step` does."""
        for token in tokens:
            logits = self.step(torch.full(self.shape, token, device=self.model.device))
        return logits

    def reorder(self, parents: Tensor) -> None:
        """Makes every beam continue the text of beam ``parents`` [prompts, beams] int64 of its prompt."""
        self.cache.reorder(parents)

    def _compute(self, tokens: Tensor) -> Tensor:
        """The logits of :meth:`step`, in any dtype."""
        embeddings = self.model.encoder_stack.embed(tokens)
        plan = self.cache.step(self._lines, self._scale, self._granularity)
        if self._copies > 1:
            embeddings = embeddings.expand(-1, self._copies, -1)
        if self.model.compiled_steps is not None:
            return self.model.compiled_steps.logits(self.model, embeddings, plan, self.memory)[:, : self.cache.beams]
        hidden: Tensor = self.model.decoder(embeddings, plan, self.memory, self.model.dtype)
        return self.model.logits(hidden[:, : self.cache.beams])
