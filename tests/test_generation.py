"""Generated texts: those of transformers token for token, the same in a batch as alone, and every option's effect."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS
from exactness import compare
from torch import Tensor
from toy_texts import (
    NEW_TOKENS,
    cut,
    ours,
    own_model,
    prompts,
    reference_model,
    skip_beams_of_another_search,
    theirs,
    toy_state,
)

from nai_t5_core.bench.peers import own_t5, transformers_t5
from nai_t5_core.facts.config import decoder_tensors, encoder_tensors
from nai_t5_core.generation import token_scores
from nai_t5_core.weights.load import load_whole

sys.path.append(str(Path(__file__).parents[1]))  # the recipe is not part of the installed package

from embedded.tasks import SEED, held_out_tasks

# ---------------------------------------------------------------------------------------------------------------------
# Token for token
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v1.1", pytest.param("umt5", marks=pytest.mark.slow)])
@torch.no_grad()
def test_texts_are_those_of_transformers(
    kind: str, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """Over every setting. A difference is allowed only between texts that are equally likely to 1e-6."""
    count = request.config.getoption("--exactness-prompts")
    exact = own_model(kind, torch.float64)
    counted = compare(*prompts(count), partial(ours, kind), partial(theirs, kind), exact)
    record_property(f"generation, {kind}", str(counted))
    assert not counted.unexplained, counted.unexplained[:3]
    # The toys say different things, and end where they want to.
    assert len(counted.distinct) > count and len(counted.lengths) == NEW_TOKENS
    assert counted.lengths[NEW_TOKENS] < 0.6 * counted.compared


@pytest.mark.slow
@torch.no_grad()
def test_texts_of_the_embedded_model_are_those_of_transformers(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """Over every setting, for questions that it was not trained on."""
    pytest.importorskip("transformers", reason="transformers is the oracle")
    loaded = load_whole(None, torch.float32, "cpu")
    config, examination = loaded.model.config, loaded.examination
    state = {name: examination.read(name).float() for name in encoder_tensors(config) | decoder_tensors(config)}
    count = request.config.getoption("--exactness-prompts")
    questions = [question for question, _ in held_out_tasks(SEED + 2, 40 * count)][:count]
    assert len(questions) == count and loaded.tokenizer is not None
    batch = loaded.tokenizer(questions)
    model, reference = own_t5(config, state, torch.float32), transformers_t5(config, state, torch.float32)

    def found(ids: Tensor, mask: Tensor, **options: Any) -> list[list[int]]:
        return cut(model.generate(ids, mask, max_new_tokens=NEW_TOKENS, **options))

    def expected(ids: Tensor, mask: Tensor, **options: Any) -> list[list[int]]:
        skip_beams_of_another_search(reference, options.get("num_beams", 1))
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **options}
        return cut(reference.generate(ids, attention_mask=mask, **options)[:, 1:])

    ids, mask = torch.tensor(batch.input_ids), torch.tensor(batch.attention_mask)
    counted = compare(ids, mask, found, expected, own_t5(config, state, torch.float64))
    record_property("generation, the embedded model", str(counted))
    assert not counted.unexplained, counted.unexplained[:3]
    assert len(counted.distinct) > 0.5 * count


@pytest.mark.parametrize("kind", ["v1.0", "byt5", "ul2"])
@torch.no_grad()
def test_other_kinds(kind: str) -> None:
    ids, mask = prompts(40, seed=1)
    for options in ({}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": 0.3, "early_stopping": True}):
        assert ours(kind, ids, mask, **options) == theirs(kind, ids, mask, **options), options


RULES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.8},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"min_new_tokens": 6},
    {"min_new_tokens": NEW_TOKENS},
    {"max_new_tokens": 1},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
]


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("rules", RULES, ids=str)
@torch.no_grad()
def test_rules(rules: dict[str, Any], beams: int) -> None:
    ids, mask = prompts(40, seed=2)
    found = ours("v1.1", ids, mask, num_beams=beams, **rules)
    assert found == theirs("v1.1", ids, mask, num_beams=beams, **rules)
    assert found != ours("v1.1", ids, mask, num_beams=beams), "the rules change nothing here"
    assert min(map(len, found)) >= rules.get("min_new_tokens", 1)


@pytest.mark.parametrize(("rows", "length"), [(3, 128 * 40), (1, 128), (2, 96), (4, 32128)])
@pytest.mark.parametrize("count", [1, 2, 16])
def test_largest_scores(rows: int, length: int, count: int) -> None:
    """In long rows of whole blocks and in others, with banned scores among them."""
    scores = torch.randn(rows, length, generator=torch.Generator().manual_seed(length))
    scores[0, length // 2 :] = -torch.inf
    expected = scores.topk(count)
    values, places = token_scores.find_largest(scores, count)
    assert torch.equal(values, expected.values) and torch.equal(places, expected.indices)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@torch.no_grad()
def test_several_texts_for_a_prompt(early_stopping: Any) -> None:
    ids, mask = prompts(40, seed=3)
    options = {"num_beams": 5, "num_return_sequences": 5, "early_stopping": early_stopping}
    found = ours("umt5", ids, mask, **options)
    assert found == theirs("umt5", ids, mask, **options)
    assert all(len(set(map(tuple, found[start : start + 5]))) == 5 for start in range(0, 200, 5))


@pytest.mark.parametrize("beams", [1, 4])
@torch.no_grad()
def test_start_tokens(beams: int) -> None:
    """Another start token, and tokens that every text begins with; neither counts as new."""
    ids, mask = prompts(40, seed=4)
    started = ours("v1.1", ids, mask, num_beams=beams, decoder_start_token_id=7)
    assert started == theirs("v1.1", ids, mask, num_beams=beams, decoder_start_token_id=7)
    forced = ours("v1.1", ids, mask, num_beams=beams, forced_start=[5, 9, 11], no_repeat_ngram_size=2)
    given = torch.tensor([[0, 5, 9, 11]]).expand(40, -1)
    expected = reference_model("v1.1").generate(
        ids,
        attention_mask=mask,
        decoder_input_ids=given,
        do_sample=False,
        num_beams=beams,
        max_new_tokens=NEW_TOKENS,
        no_repeat_ngram_size=2,
    )
    assert forced == cut(expected[:, 4:])
    assert forced != ours("v1.1", ids, mask, num_beams=beams, no_repeat_ngram_size=2)


@torch.no_grad()
def test_other_special_tokens() -> None:
    ids, mask = prompts(40, seed=5)
    tokens = own_model("v1.1").generate(ids, mask, max_new_tokens=NEW_TOKENS, eos_token_id=30, pad_token_id=50)
    expected = reference_model("v1.1").generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=30, pad_token_id=50
    )
    assert torch.equal(tokens, expected[:, 1:])
    assert (tokens == 30).any() and (tokens == 50).any()


# ---------------------------------------------------------------------------------------------------------------------
# Batches, memory, steps
# ---------------------------------------------------------------------------------------------------------------------

WAYS: list[dict[str, Any]] = [
    {},
    {"num_beams": 4},
    {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
    {"num_beams": 3, "early_stopping": "never", "num_return_sequences": 2, "no_repeat_ngram_size": 2},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("kind", ["v1.1", "umt5"])
@torch.no_grad()
def test_a_batch_is_its_prompts_one_by_one(kind: str, options: dict[str, Any]) -> None:
    ids, mask = prompts(24, seed=6)
    together = ours(kind, ids, mask, **options)
    alone = []
    for row, length in zip(ids, mask.sum(1).tolist(), strict=True):
        alone += ours(kind, row[None, :length], None, **options)
    assert together == alone
    assert len(set(map(len, together))) > 3


@torch.no_grad()
def test_padding_on_either_side_and_none() -> None:
    ids, mask = prompts(24, seed=7)
    left_ids, left_mask = torch.zeros_like(ids), mask.flip(1)
    left_ids[left_mask.bool()] = ids[mask.bool()]
    for options in WAYS:
        assert ours("v1.1", ids, mask, **options) == ours("v1.1", left_ids, left_mask, **options)


@pytest.mark.parametrize("options", WAYS, ids=str)
@torch.no_grad()
def test_result_is_padded_behind_the_end(options: dict[str, Any]) -> None:
    """int64, as long as the longest text, the pad token behind every end."""
    ids, mask = prompts(24, seed=8)
    tokens = own_model("v1.1").generate(ids, mask, max_new_tokens=NEW_TOKENS, **options)
    texts = cut(tokens)
    assert tokens.dtype == torch.int64
    # Labels of a training step, for one, must be ordinary tensors.
    assert not tokens.is_inference()
    assert tokens.shape == (24 * options.get("num_return_sequences", 1), max(map(len, texts)))
    for row, text in zip(tokens.tolist(), texts, strict=True):
        assert row[len(text) :] == [0] * (tokens.shape[1] - len(text))


@pytest.mark.parametrize("options", WAYS, ids=str)
@torch.no_grad()
def test_a_cache_serves_many_calls(options: dict[str, Any]) -> None:
    model = own_model("umt5")
    cache = model.new_cache(10, options.get("num_beams", 1), NEW_TOKENS + 5)
    address = cache.keys_values.data_ptr()
    for seed in (9, 10):
        ids, mask = prompts(10, seed)
        with_cache = model.generate(ids, mask, cache=cache, max_new_tokens=NEW_TOKENS, **options)
        assert torch.equal(with_cache, model.generate(ids, mask, max_new_tokens=NEW_TOKENS, **options))
    assert cache.keys_values.data_ptr() == address
    with pytest.raises(ValueError, match=r"the cache is for \d texts per prompt of 19 tokens; \d of 41 are needed"):
        model.generate(ids, mask, cache=cache, max_new_tokens=40, **options)
    with pytest.raises(ValueError, match="the cache is for 10 prompts, and there are 3"):
        model.generate(ids[:3], mask[:3], cache=cache, max_new_tokens=NEW_TOKENS, **options)
    for other in (own_model("umt5", torch.float64), own_model("ul2")):
        with pytest.raises(ValueError, match="the cache is for another model, dtype or device"):
            other.generate(ids, mask, cache=cache, max_new_tokens=NEW_TOKENS, **options)


def test_a_cache_made_in_inference_mode_serves_outside_of_it() -> None:
    model, (ids, mask) = own_model("v1.1"), prompts(4, seed=18)
    with torch.inference_mode():
        cache = model.new_cache(4, 3, NEW_TOKENS + 1)
    options = {"num_beams": 3, "max_new_tokens": NEW_TOKENS}
    assert torch.equal(model.generate(ids, mask, cache=cache, **options), model.generate(ids, mask, **options))


@pytest.mark.parametrize("fixed_shapes", [False, True])
@torch.no_grad()
def test_nothing_of_an_earlier_text_is_left(fixed_shapes: bool) -> None:
    model, (ids, mask) = own_model("v1.1"), prompts(6, seed=17)
    cache = model.new_cache(6, 3, 30)
    cache.keys_values.fill_(torch.nan)
    options = {"num_beams": 3, "max_new_tokens": NEW_TOKENS, "fixed_shapes": fixed_shapes}
    assert torch.equal(model.generate(ids, mask, cache=cache, **options), model.generate(ids, mask, **options))


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("kind", ["v1.1", "umt5"])
@torch.no_grad()
def test_fixed_shapes_are_compiled_once(kind: str, options: dict[str, Any]) -> None:
    from torch._dynamo.testing import CompileCounter

    model, counter = own_t5(TOY_CONFIGS[kind], toy_state(kind), torch.float32), CompileCounter()
    batches = [prompts(6, seed) for seed in (11, 12)]
    for ids, mask in batches:
        ids[0], mask[0] = 5, 1
    expected = [ours(kind, ids, mask, **options) for ids, mask in batches]
    torch._dynamo.reset()
    model.decoder.compile(backend=counter, fullgraph=True)
    found = [
        cut(model.generate(ids, mask, fixed_shapes=True, max_new_tokens=NEW_TOKENS, **options)) for ids, mask in batches
    ]
    assert found == expected
    assert counter.frame_count == 1


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0; it must be 1 or more"),
        ({"num_beams": 0}, "num_beams=0; it must be 1 or more"),
        ({"top_k": -1}, "top_k=-1; it must be 0 or more"),
        ({"max_new_tokens": 10**9}, "max_new_tokens=1000000000; it must be at most 8,192"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5; it must be a whole number, 1 or more"),
        ({"max_new_tokens": "5"}, "max_new_tokens='5'; it must be a whole number"),
        ({"num_beams": True}, "num_beams=True; it must be a whole number"),
        ({"num_return_sequences": 10**9}, "num_return_sequences=1000000000; it must be at most 100,000"),
        ({"no_repeat_ngram_size": 2.0}, "no_repeat_ngram_size=2.0; it must be a whole number"),
        ({"temperature": float("nan")}, "temperature=nan; it must be a finite number"),
        ({"top_p": "1"}, "top_p='1'; it must be a finite number"),
        ({"length_penalty": float("inf")}, "length_penalty=inf; it must be a finite number"),
        ({"eos_token_id": "5"}, "eos_token_id: token 5 is outside the vocabulary of 96 tokens"),
        ({"top_p": 0.0}, "top_p=0.0; it must be above 0 and at most 1"),
        ({"temperature": 0.0}, "temperature=0.0; it must be above 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0; it must be above 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 is above max_new_tokens=8"),
        ({"early_stopping": "always"}, "early_stopping='always'; allowed: True, False, 'never'"),
        ({"do_sample": True, "num_beams": 2}, "do_sample=True goes with num_beams=1"),
        ({"num_return_sequences": 3}, "num_return_sequences=3 with num_beams=1"),
        ({"eos_token_id": 96}, "eos_token_id: token 96 is outside the vocabulary of 96 tokens"),
        ({"forced_start": [3, -1]}, "forced_start: token -1 is outside the vocabulary"),
    ],
    ids=str,
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        own_model("v1.1").generate(*prompts(2), **options)


def test_other_mistakes() -> None:
    ids, mask = prompts(2)
    with pytest.raises(ValueError, match="num_beams=2 cannot be streamed"):
        own_model("v1.1").stream(ids, mask, num_beams=2)
    with pytest.raises(TypeError, match="num_beam"):
        own_model("v1.1").generate(ids, mask, num_beam=2)
    state = toy_state("v1.1")
    state["lm_head.weight"][3, 3] = torch.nan
    damaged = own_t5(TOY_CONFIGS["v1.1"], state, torch.float32)
    with pytest.raises(ValueError, match=r"not finite in torch.float32: the weights are damaged"):
        damaged.generate(ids, mask)
