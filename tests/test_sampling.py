"""Sampling from the distribution that transformers samples from, and tokens one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_texts import ours, own_model, prompts, theirs

from nai_t5_core.generation import token_scores
from nai_t5_core.generation.options import GenerationOptions

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.8, "top_k": 7},
    {"top_p": 0.8},
    {"top_p": 0.01},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.6},
    {"top_k": 1000},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filtered_distribution(filters: dict[str, Any]) -> None:
    """Bit for bit that of transformers' own filters, in their order."""
    generation = pytest.importorskip("transformers.generation", reason="transformers is the oracle")
    scores = torch.randn(50, 96, generator=torch.Generator().manual_seed(1)) * 3
    scores[:, 5] = scores[:, 6]
    expected = scores
    for name, filter_class in {
        "temperature": generation.TemperatureLogitsWarper,
        "top_k": generation.TopKLogitsWarper,
        "top_p": generation.TopPLogitsWarper,
    }.items():
        if name in filters:
            expected = filter_class(filters[name])(None, expected)
    found = GenerationOptions(do_sample=True, **filters).apply_filters(scores)
    assert torch.equal(found, expected)
    assert (found > -torch.inf).any(dim=1).all()


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@torch.no_grad()
def test_samples_are_those_of_transformers(filters: dict[str, Any]) -> None:
    """The same seed gives the same tokens, and again; another gives others."""
    ids, mask = prompts(30, seed=13)
    options = {"do_sample": True, "num_return_sequences": 2, "repetition_penalty": 1.1, **filters}
    torch.manual_seed(5)
    expected = theirs("v1.1", ids, mask, **{"top_k": 0, **options})
    sample = [ours("v1.1", ids, mask, generator=torch.Generator().manual_seed(seed), **options) for seed in (5, 5, 6)]
    assert sample[0] == expected == sample[1]
    assert filters.get("top_p") == 0.01 or sample[2] != sample[0]


@torch.no_grad()
def test_frequencies_are_the_probabilities() -> None:
    ids, mask = prompts(1, seed=14)
    model = own_model("v1.1")
    options = {"do_sample": True, "top_k": 5, "temperature": 1.5, "num_return_sequences": 4000, "max_new_tokens": 1}
    tokens = model.generate(ids, mask, generator=torch.Generator().manual_seed(0), **options)[:, 0]
    logits = model(ids, mask, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[0, 0]
    expected = token_scores.keep_top_k(logits[None] / 1.5, 5).softmax(-1)[0]
    frequencies = tokens.bincount(minlength=96) / 4000
    # Four standard deviations of the likeliest token's share.
    assert float((frequencies - expected).abs().max()) <= 4 * 0.5 / 4000**0.5
    assert int((frequencies > 0).sum()) == 5


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@torch.no_grad()
def test_stream(options: dict[str, Any]) -> None:
    ids, mask = prompts(8, seed=15)
    model = own_model("v1.1")
    expected = model.generate(ids, mask, generator=torch.Generator().manual_seed(1), **options)
    tokens: Iterator[Tensor] = model.stream(ids, mask, generator=torch.Generator().manual_seed(1), **options)
    first = next(tokens)
    assert first.shape == (8 * options.get("num_return_sequences", 1),)
    assert torch.equal(torch.stack([first, *tokens], dim=1), expected)


def test_streams_need_no_grad_of_the_caller() -> None:
    ids, mask = prompts(3, seed=16)
    for tokens in own_model("v1.1").stream(ids, mask, max_new_tokens=3):
        assert not tokens.requires_grad and torch.is_grad_enabled()
    assert not own_model("v1.1").generate(ids, mask, num_beams=2, max_new_tokens=3).requires_grad
