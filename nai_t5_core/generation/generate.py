"""Greedy generation, sampling and beam search, batched over prompts of different lengths.

The same options give the same tokens as in transformers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nai_t5_core.generation.beam_search import beam_search
from nai_t5_core.generation.decoding import Decoding
from nai_t5_core.generation.options import GenerationOptions
from nai_t5_core.model.decoder_attention import DecoderCache
from nai_t5_core.model.t5 import T5Model


def generate(
    model: T5Model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    generator: torch.Generator | None = None,
    cache: DecoderCache | None = None,
) -> Tensor:
    """See :meth:`nai_t5_core.T5.generate`; ``options`` are the result of :meth:`GenerationOptions.for_model`."""
    if options.num_beams > 1:
        return beam_search(_prepare(model, input_ids, attention_mask, options, cache), options).tokens
    return torch.stack(list(stream(model, input_ids, attention_mask, options, generator, cache)), dim=1)


def stream(
    model: T5Model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    generator: torch.Generator | None = None,
    cache: DecoderCache | None = None,
) -> Iterator[Tensor]:
    """See :meth:`nai_t5_core.generation.t5.T5.stream`.

    Raises:
        ValueError: more than one beam, since then no token is certain before the end.
    """
    if options.num_beams > 1:
        raise ValueError(f"num_beams={options.num_beams} cannot be streamed: no token is certain before the end")
    return _stream(_prepare(model, input_ids, attention_mask, options, cache), options, generator)


@torch.no_grad()
def _prepare(
    model: T5Model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    cache: DecoderCache | None,
) -> Decoding:
    """Reads the prompts, and makes a cache for the texts, or checks that the given one has room."""
    memory = model.read(input_ids, attention_mask, keep_length=options.fixed_shapes)
    beams, length = options.texts_per_prompt, options.total_length
    if cache is None:
        cache = model.new_cache(memory.prompts, beams, length)
    elif cache.beams != beams or cache.length < length:
        raise ValueError(
            f"the cache is for {cache.beams} texts per prompt of {cache.length} tokens; {beams} of {length} are needed"
        )
    return Decoding(model, memory, cache, options.fixed_shapes)


@torch.no_grad()
def _stream(decoding: Decoding, options: GenerationOptions, generator: torch.Generator | None) -> Iterator[Tensor]:
    prompts, width = decoding.shape
    device = decoding.model.device
    history = torch.full((prompts * width, options.total_length), options.pad_token, device=device)
    for place, token in enumerate(options.start):
        history[:, place] = token
    is_finished = torch.zeros(prompts * width, dtype=torch.bool, device=device)
    logits = decoding.begin(options.start)
    for length in range(len(options.start), options.total_length):
        if options.do_sample:
            decoding.ask()  # a draw from what is not finite would be an error of torch's
        scores = options.apply_rules(logits.flatten(0, 1), history[:, :length])
        tokens = _choose(scores, options, generator).masked_fill(is_finished, options.pad_token)
        history[:, length] = tokens
        is_finished = is_finished | (tokens == options.end_token)
        (have_ended,) = decoding.ask(is_finished.all())
        yield tokens
        if have_ended or length + 1 == options.total_length:
            return
        logits = decoding.step(tokens.unflatten(0, (prompts, width)))


def _choose(scores: Tensor, options: GenerationOptions, generator: torch.Generator | None) -> Tensor:
    """The next tokens [texts], chosen by scores [texts, vocab_size]."""
    if not options.do_sample:
        return scores.argmax(dim=-1)
    probabilities = options.apply_filters(scores).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
