"""The whole T5: encoder, decoder and output head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import StackScales, unscaled
from nai_t5_core.model.attention import logit_scale
from nai_t5_core.model.decoder import Decoder
from nai_t5_core.model.decoder_attention import CachedAttention, CausalAttention, CrossMemory, DecoderCache
from nai_t5_core.model.encoder import Layout, T5EncoderStack, init_modules
from nai_t5_core.model.fixed_weights import refuse_change
from nai_t5_core.model.inputs import check_ids, moved
from nai_t5_core.model.layers import residual_dtype, scaled
from nai_t5_core.model.packing import PaddingPolicy
from nai_t5_core.model.turns import Turns

IGNORE_INDEX = -100


class T5Output(NamedTuple):
    """The result of :class:`T5Model`: logits [prompts, length, vocab_size], and the loss, or None without labels."""

    logits: Tensor
    loss: Tensor | None


class StepRunner(Protocol):
    """What computes the decoder's steps in generation in place of its modules.

    Attributes:
        slots_at_once: a step reads a multiple of this many slots of the cache.
    """

    slots_at_once: int

    def prepare(self, cache: DecoderCache, memory: CrossMemory) -> None:
        """Called once, before the first step of a generation."""
        ...

    def logits(self, model: T5Model, embeddings: Tensor, plan: CachedAttention, memory: CrossMemory) -> Tensor:
        """The last tokens' embeddings [prompts, queries, d_model] to logits [prompts, queries, vocab_size]."""
        ...


class T5Model(nn.Module):
    """A T5 with encoder, decoder and output head; :class:`nai_t5_core.generation.t5.T5` also generates.

    Module and tensor names are those of Hugging Face checkpoints. A tied head is the embedding's own parameter.

    Args:
        config: the sizes; ``num_decoder_layers`` is at least 1.
        layout, ops, device, dtype: as for :class:`nai_t5_core.model.encoder.T5EncoderStack`.
        scales, decoder_scales: powers of two that keep a float16 model in range; by default nothing is scaled. The
            embedding table, which both stacks share, has the scale that ``scales`` gives it.

    Attributes:
        turns: threads may generate at once, and what changes the decoder meanwhile (the guard) waits for its turn.

    Raises:
        ValueError: a config without decoder, or scales for another number of layers.
    """

    def __init__(
        self,
        config: T5Config,
        layout: Layout = "fused",
        ops: Any = nn,
        scales: StackScales | None = None,
        decoder_scales: StackScales | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.num_decoder_layers == 0:
            raise ValueError("num_decoder_layers=0: this is no T5 with a decoder; use T5EncoderStack for an encoder")
        self.config = config
        self.turns = Turns()
        self.layout = layout
        self.decoder_scales = decoder_scales or unscaled(config.num_decoder_layers)
        if len(self.decoder_scales.layers) != config.num_decoder_layers:
            raise ValueError(
                f"decoder_scales of {len(self.decoder_scales.layers)} layers for a decoder of "
                f"{config.num_decoder_layers} layers"
            )
        stack = T5EncoderStack(config.encoder_only(), layout, ops, scales, device=device, dtype=dtype)
        self.shared, self.encoder = stack.shared, stack.encoder
        self.decoder = Decoder(config, layout, self.decoder_scales, ops, device=device, dtype=dtype)
        self.lm_head = ops.Linear(config.d_model, config.vocab_size, bias=False, device=device, dtype=dtype)
        # How steps are computed once `nai_t5_core.backends.compiled.compile_steps` was called.
        self.compiled_steps: StepRunner | None = None
        # In a tuple, so that torch does not register it: its modules are already registered above.
        self._encoder_stack = (stack,)
        self._tie()

    @property
    def encoder_stack(self) -> T5EncoderStack:
        """The encoder as a model by itself; the modules are this model's."""
        return self._encoder_stack[0]

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: that of the embedding table."""
        return self.encoder_stack.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder_stack.device

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Assigns tensors by this model's names as its weights, without a copy; a tied head needs no tensor."""
        head = {"lm_head.weight": tensors["shared.weight"]} if self.config.tie_word_embeddings else {}
        self.load_state_dict({**head, **tensors}, assign=True)
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.shared.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> T5Model:
        refuse_change(self, fn)
        super()._apply(fn, recurse)
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> T5Output:
        """Logits of every position of a known text, and the loss if the text is given as labels.

        Args:
            input_ids: [prompts, length] integers below ``config.vocab_size``.
            attention_mask: [prompts, length], non-zero at real tokens; None where there are no pad tokens.
            decoder_input_ids: [prompts, text length]; by default the labels shifted right behind the start token.
            labels: [prompts, text length] ids; −100 where nothing is to be learned.

        Returns:
            Logits in the compute dtype, and the mean cross-entropy over the labels that count in float32 (float64 in a
            float64 model).

        Raises:
            ValueError: neither decoder ids nor labels, shapes that do not go together, ids outside the vocabulary.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("give decoder_input_ids or labels; to generate text, call generate()")
            decoder_input_ids = self.shift_right(labels)
        memory = self.read(input_ids, attention_mask)
        logits = self.logits(self.decode(decoder_input_ids, memory))
        return T5Output(logits, None if labels is None else self._loss(logits, labels))

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        expected = logits.shape[:2]
        if labels.shape != expected:
            raise ValueError(
                f"labels have shape {list(labels.shape)}, decoder_input_ids {list(expected)}; they must be equal"
            )
        check_ids(labels.masked_fill(labels == IGNORE_INDEX, 0), self.config.vocab_size)
        flat = logits.flatten(0, 1).to(residual_dtype(self.dtype))
        return F.cross_entropy(flat, labels.to(flat.device).flatten(), ignore_index=IGNORE_INDEX)

    def shift_right(self, labels: Tensor) -> Tensor:
        """Labels [prompts, length] to what the decoder reads: the start token, then all labels but the last.

        Raises:
            ValueError: labels of another shape, or none.
        """
        if labels.ndim != 2 or labels.shape[1] == 0:
            raise ValueError(f"labels have shape {list(labels.shape)}; [prompts, length] with a label at least")
        shifted = labels.roll(1, dims=-1)
        shifted[:, 0] = self.config.decoder_start_token_id
        return shifted.masked_fill(shifted == IGNORE_INDEX, self.config.pad_token_id)

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None, keep_length: bool = False) -> CrossMemory:
        """Encodes prompts, and computes the keys and values that cross-attention reads. Pad tokens are not computed.

        Args:
            input_ids, attention_mask: as for a call.
            keep_length: keep as many keys as there are ids; else they are cut to the longest prompt.

        Raises:
            ValueError: ids outside the vocabulary, or a mask of another shape.
        """
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"the mask has shape {list(attention_mask.shape)}, the ids {list(input_ids.shape)}; they must be equal"
            )
        # On the CPU, where it is looked at: a mask on the device is waited for once.
        mask = None if attention_mask is None else (attention_mask != 0).cpu()
        padding: PaddingPolicy = "skip" if keep_length else "trim"
        if mask is not None and not bool(mask.any(dim=1).all()):
            # Cross-attention reads a fully masked prompt evenly over all its pad rows, so these have to be computed.
            padding = "exact"
        embeddings, plan, packing = self.encoder_stack.prepare(input_ids, mask, padding=padding)
        states = self.encoder(embeddings, plan, self.dtype)
        mask = None if mask is None else moved(mask[:, : packing.output_length], states.device)
        return self.decoder.read(states, packing, mask, logit_scale(self.config))

    def decode(self, decoder_input_ids: Tensor, memory: CrossMemory) -> Tensor:
        """The decoder's hidden states of a known text: [prompts, length] ids to [prompts, length, d_model]."""
        if decoder_input_ids.ndim != 2 or decoder_input_ids.shape[0] != memory.prompts:
            raise ValueError(
                f"decoder_input_ids have shape {list(decoder_input_ids.shape)}; [{memory.prompts}, length] is needed"
            )
        check_ids(decoder_input_ids, self.config.vocab_size)
        plan = CausalAttention(
            self.decoder.bias_tables(self.dtype), decoder_input_ids.shape[1], logit_scale(self.config)
        )
        embeddings = self.encoder_stack.embed(decoder_input_ids.to(self.device))
        hidden: Tensor = self.decoder(embeddings, plan, memory, self.dtype)
        return hidden

    def logits(self, hidden: Tensor, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Hidden states [..., d_model] to logits [..., vocab_size] in the compute dtype.

        With a tied head whose embedding is scaled, logits are divided by that scale in float32, since they may exceed
        the compute dtype. ``head`` is called in place of the model's own head.
        """
        logits: Tensor = (self.lm_head if head is None else head)(scaled(hidden, self.config.head_scale))
        embedding = self.encoder_stack.scales.embedding if self.config.tie_word_embeddings else 1.0
        return logits if embedding == 1 else logits.to(residual_dtype(self.dtype)) / embedding

    def new_cache(self, prompts: int, beams: int, length: int) -> DecoderCache:
        """A cache for texts of up to ``length`` tokens, start token included; ``generate`` can use it many times."""
        if self.compiled_steps is not None:
            # A few slots more, so that no step reads all slots: that would be compiled anew.
            length += self.compiled_steps.slots_at_once
        return DecoderCache(self.config, prompts, beams, length, self.dtype, self.device)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch, by the scheme of :meth:`T5EncoderStack.init_weights`."""
        self.encoder_stack.init_weights(generator)
        init_modules(self.decoder, self.config, generator)
        if not self.config.tie_word_embeddings:
            nn.init.normal_(self.lm_head.weight, std=self.config.d_model**-0.5, generator=generator)

    def extra_repr(self) -> str:
        return f"{self.config.kind}, {self.layout}, {self.dtype}, attention=sdpa"
