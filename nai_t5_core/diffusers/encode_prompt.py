"""A pipeline's own `encode_prompt`, with all of its T5's work done in one packed pass before.

    pipe = replace_text_encoder(pipe)
    pipe(**encode_prompt(pipe, "a cat", negative_prompt="blurred"))

The pipeline's code makes the result, so that names, order, shapes, dtypes and masks are its own. What is predicted here
is only which token ids it will ask its T5 for; a wrong prediction costs the time of a second pass and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.diffusers.outputs import EncodedPrompt, call_arguments, join_chunks
from nai_t5_core.diffusers.requests import Request, Run, Texts
from nai_t5_core.diffusers.requests import adapted_families as adapted_families
from nai_t5_core.diffusers.row_memory import RowMemory


@torch.no_grad()
def encode_prompt(
    pipe: Any,
    prompt: str | list[str],
    *,
    word_weights: Mapping[str, float] | None = None,
    max_chunks: int = 1,
    **options: Any,
) -> EncodedPrompt:
    """What ``pipe.encode_prompt(prompt, **options)`` gives, for the pipeline's call, with one pass through the T5.

    Prompts and negative prompts are encoded together, each different one once, before the pipeline's own function runs.

    Args:
        pipe: a pipeline of one of :func:`adapted_families` whose T5 is ours, see
            :func:`nai_t5_core.diffusers.adapter.replace_text_encoder`.
        prompt: a text, or a list of them; of VisualCloze the content prompt.
        options: what its ``encode_prompt`` takes, and the negative prompt where only its call takes one. By default
            they are as in a call of the pipeline, which may be other values than its ``encode_prompt`` has.
        word_weights: such as ``{"red fox": 1.3}``. The T5's rows for these words are multiplied by the number, wherever
            the words stand in a prompt or negative prompt; other encoders do not know of it.
        max_chunks: up to so many pieces are made of a prompt that exceeds the length, split between words, each encoded
            by itself, and their rows are joined. All prompts and negative prompts get as many rows as the longest:
            where the pad rows of a family count for nothing, so do those of an absent piece, else it is the empty text.
            Other encoders than the T5 get the whole prompt. No model was trained so.

    Returns:
        What the call takes: ``pipe(**encode_prompt(pipe, …), …)``. ``outputs`` holds all that the pipeline's function
        gives, in its order: shapes, dtypes and masks are those of the pipeline, and with the policy ``"skip"``, rows of
        pads that it would keep are zeros. ``cut_text`` and ``negative_cut_text`` tell what is too long.

    Raises:
        ValueError: another pipeline, one whose T5 is not ours, no prompt, an option that its ``encode_prompt`` has
            not, words that stand in no prompt, a prompt that is changed in unforeseen ways before it is weighted,
            weights for a family that cannot have them, or ``max_chunks`` for one whose model takes no longer text.
    """
    request = Request.of(pipe, prompt, options)
    runs = request.runs()
    texts = [request.texts(run) for run in runs]
    chunks = request.chunks(texts, max_chunks, word_weights or ())
    weights = request.token_weights(word_weights or {}, [text for each in texts for text in _all(each)])
    memories = _encoded(request, chunks, weights)
    outputs: dict[str, Any] = {}
    for run, chunks_of_run in zip(runs, chunks, strict=True):
        outputs |= _results(request, run, chunks_of_run, memories)
    if weights and any(memory.missed for memory in memories):
        raise ValueError(request.no_weights("changes these prompts itself"))
    if request.facts.call_takes == "unprojected":
        arguments = _before_projection(request, chunks[0], memories)
    else:
        arguments = call_arguments(pipe, request.facts.call_takes, request.arguments, outputs)
    return EncodedPrompt(outputs, *_cut(request, chunks), arguments, type(pipe).__name__)


def cut_text(pipe: Any, prompt: str | list[str], **options: Any) -> list[str]:
    """What the T5 does not see of each prompt because it is too long; "" where it sees all.

    Arguments and errors as for :func:`encode_prompt`; the text is that of the tokens, so it may be written differently.
    """
    return _cut_whole(pipe, prompt, options)[0]


def negative_cut_text(pipe: Any, prompt: str | list[str], **options: Any) -> list[str]:
    """The same of each negative prompt; an empty list where the T5 gets none."""
    return _cut_whole(pipe, prompt, options)[1]


def _cut_whole(pipe: Any, prompt: str | list[str], options: dict[str, Any]) -> tuple[list[str], list[str]]:
    request = Request.of(pipe, prompt, options)
    return _cut(request, [[request.texts(run)] for run in request.runs()])


def weighted(hidden: Tensor, input_ids: Tensor, weights: Mapping[tuple[int, ...], float]) -> Tensor:
    """Hidden states [batch, length, d_model] with the rows of each run of ids [batch, length] times its weight."""
    factors = torch.ones(input_ids.shape, dtype=torch.float32)
    for run, weight in weights.items():
        for row, ids in enumerate(input_ids.tolist()):
            for start in range(len(ids) - len(run) + 1):
                if tuple(ids[start : start + len(run)]) == run:
                    factors[row, start : start + len(run)] *= weight
    return hidden * factors[..., None].to(hidden)


def _encoded(
    request: Request, chunks: list[list[Texts]], weights: Mapping[tuple[int, ...], float]
) -> tuple[RowMemory, RowMemory]:
    """The rows of all texts: for the first chunks, and for those after them, where "" may stand for no text at all."""
    first = RowMemory()
    encoder = getattr(request.pipe, request.component)
    for input_ids, attention_mask in request.batches(texts for each in chunks for texts in each):
        hidden = encoder(input_ids, attention_mask)[0]
        hidden = weighted(hidden, input_ids, weights) if weights else hidden
        if request.facts.one_by_one:
            assert attention_mask is not None
            first.add_each_alone(input_ids, attention_mask, hidden)
        else:
            first.add(input_ids, attention_mask, hidden)
    if len(chunks[0]) == 1 or request.row.padding != "skip":
        return first, first
    later = first.copy()
    input_ids, attention_mask = request.batch([""])
    later.add(input_ids, attention_mask, hidden.new_zeros(*input_ids.shape, hidden.shape[-1]))
    return first, later


def _results(request: Request, run: Run, chunks: list[Texts], memories: tuple[RowMemory, RowMemory]) -> dict[str, Any]:
    """What the pipeline's own function gives for a run, by name, its chunks joined."""
    names, others = (
        [run.naming.format(name) for name in each] for each in (request.facts.outputs, request.facts.of_others)
    )
    parts = []
    for place, texts in enumerate(chunks):
        # Lists in place of single texts, since several pipelines take "" for no text.
        arguments = run.arguments | texts if len(chunks) > 1 else run.arguments
        with request.model.remembering(memories[place > 0]):
            results = request.pipe.encode_prompt(**arguments)
        part = dict(zip(names, results if isinstance(results, tuple) else (results,), strict=True))
        parts.append(_without_absent(part, request) if place else part)
    return join_chunks(parts, request.length, others)


def _without_absent(part: dict[str, Any], request: Request) -> dict[str, Any]:
    """A part whose masks [batch, length] hide the texts that have no more tokens than the empty one."""
    shown = dict(part)
    for name, mask in part.items():
        if name.endswith("mask") and mask is not None:
            counts = mask.reshape(len(mask), request.length, -1)[..., 0].sum(1)  # AuraFlow's is repeated over the width
            shown[name] = mask.masked_fill((counts <= 1 + request.row.extra_pad)[:, None], 0)
    return shown


def _before_projection(request: Request, chunks: list[Texts], memories: tuple[RowMemory, RowMemory]) -> dict[str, Any]:
    """Stable Audio's call projects the embeddings itself: the T5's own rows, and masks."""
    parts: list[dict[str, Any]] = []
    for place, texts in enumerate(chunks):
        part = {}
        for name, rows in texts.items():
            input_ids, mask = request.batch(rows)
            part[name + "_embeds"] = memories[place > 0].find(input_ids, mask)
            part[name.replace("prompt", "attention_mask")] = mask
        parts.append(_without_absent(part, request) if place else part)
    return join_chunks(parts, request.length)


def _cut(request: Request, chunks: list[list[Texts]]) -> tuple[list[str], list[str]]:
    """What is cut off of prompts and of negative prompts; of a text in chunks only the last can be too long."""
    cut: dict[bool, list[str]] = {}
    for run, chunks_of_run in zip(request.runs(), chunks, strict=True):
        pieces = [request.cut_text(texts) for texts in chunks_of_run]
        for name in pieces[0]:
            is_negative = run.naming.format(name).startswith("negative_")
            cut[is_negative] = ["".join(ends) for ends in zip(*(piece[name] for piece in pieces), strict=True)]
    return cut.get(False, []), cut.get(True, [])


def _all(texts: Texts) -> Iterable[str]:
    return (text for rows in texts.values() for text in rows)
