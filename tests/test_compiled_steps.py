"""Compiled steps: the tokens and logits of eager ones, few graphs, and clear refusals."""

from __future__ import annotations

import pytest
import torch
from conftest import TOY_CONFIGS, random_state
from torch._dynamo.utils import counters

from nai_t5_core.backends.choose import prepack, why_not_prepack
from nai_t5_core.backends.compiled import compile_steps
from nai_t5_core.bench.peers import own_t5
from nai_t5_core.float16.generation_guard import generate_guarded
from nai_t5_core.float16.guard import NotFiniteError
from nai_t5_core.generation.decoding import Decoding
from nai_t5_core.generation.t5 import T5
from nai_t5_core.model.attention_choice import missing_for_flex
from nai_t5_core.model.encoder import Layout

MISSING = missing_for_flex(torch.device("cpu"))
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"nothing can be compiled here: {MISSING}")

PROMPT = torch.randint(3, 96, (1, 11), generator=torch.Generator().manual_seed(1))
PADDED = torch.tensor([[1] * 7 + [0] * 4])


def toy(kind: str = "v1.1", dtype: torch.dtype = torch.float32, layout: Layout = "fused") -> T5:
    """Of two blocks, which become one graph; every further one would only take its time to compile."""
    config = TOY_CONFIGS[kind].model_copy(update={"num_layers": 1, "num_decoder_layers": 2})
    return own_t5(config, random_state(config), dtype, layout)


@pytest.fixture(scope="module")
def compiled() -> T5:
    """One for the tests that change nothing in it, and need no graphs of their own."""
    return compile_steps(toy(), backend="aot_eager")


# (prompts, beams): a lone text, several prompts, beams, and more beams than a graph spells out.
SHAPES = [(1, 1), (3, 1), (3, 4), (2, 9)]


def logits_of(model: T5, mask: torch.Tensor | None, prompts: int, beams: int) -> torch.Tensor:
    """The logits of six steps of texts that are the same for all models: [steps, prompts, beams, vocab_size]."""
    ids = (PROMPT + torch.arange(prompts)[:, None]) % 96
    mask = None if mask is None else mask.expand(prompts, -1)
    chosen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        decoding = Decoding(model, model.read(ids, mask), model.new_cache(prompts, beams, 6))
    logits = []
    for _ in range(6):
        logits.append(decoding.step(torch.randint(3, 96, (prompts, beams), generator=chosen)))
        decoding.reorder(torch.randint(0, beams, (prompts, beams), generator=chosen))
    return torch.stack(logits)


def is_near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("shape", [(1, 1), pytest.param((3, 4), marks=pytest.mark.slow)], ids=str)
def test_compiled_equals_eager(shape: tuple[int, int]) -> None:
    """With the real compiler; float32, in which only the order of sums differs."""
    eager, compiled = toy(), compile_steps(toy())
    if why_not_prepack(compiled) is None:
        compiled = prepack(compiled)
    for mask in (None, PADDED):
        assert is_near(logits_of(compiled, mask, *shape), logits_of(eager, mask, *shape))


def test_compiled_texts_equal_eager_ones() -> None:
    eager, compiled = toy("umt5"), compile_steps(toy("umt5"))
    for options in ({"num_beams": 1}, {"num_beams": 4, "length_penalty": 2.0}):
        options |= {"max_new_tokens": 30, "min_new_tokens": 30}
        assert torch.equal(compiled.generate(PROMPT, PADDED, **options), eager.generate(PROMPT, PADDED, **options))


@pytest.mark.parametrize("shape", [(1, 1), pytest.param((3, 4), marks=pytest.mark.slow)], ids=str)
def test_bfloat16_is_no_further_from_float32_than_eager_is(shape: tuple[int, int]) -> None:
    exact = logits_of(toy(), PADDED, *shape)
    eager, compiled = toy(dtype=torch.bfloat16), compile_steps(toy(dtype=torch.bfloat16))
    error, error_of_eager = (
        (logits_of(model, PADDED, *shape) - exact).square().mean().sqrt() for model in (compiled, eager)
    )
    assert 0 < error < 1.1 * error_of_eager


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "dtype", "layout"),
    [
        ("v1.0", torch.float32, "fused"),
        ("v1.1", torch.float32, "separate"),
        ("umt5", torch.float64, "fused"),
        ("v1.1", torch.float64, "fused"),
    ],
)
def test_every_kind_and_layout(kind: str, dtype: torch.dtype, layout: Layout, shape: tuple[int, int]) -> None:
    """The same graphs without inductor, whose compilation is slow."""
    eager = toy(kind, dtype, layout)
    compiled = compile_steps(toy(kind, dtype, layout), backend="aot_eager")
    assert is_near(logits_of(compiled, PADDED, *shape), logits_of(eager, PADDED, *shape))


@pytest.mark.parametrize("blocks_at_once", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_one_graph_serves_all_blocks_and_all_lengths(blocks_at_once: int) -> None:
    """Of four blocks, in groups of one, and of two where three are allowed."""
    config = TOY_CONFIGS["v1.1"].model_copy(update={"num_decoder_layers": 4})
    model = own_t5(config, random_state(config), torch.float32)
    model = compile_steps(model, blocks_at_once, backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    for length in (2, 5, 40, 128, 300):
        model.generate(PROMPT[:, :1].expand(1, length), max_new_tokens=length // 8 + 1)
    # Some blocks, and the head behind the last one.
    assert counters["stats"]["unique_graphs"] == 2
    for prompts, length in ((4, 7), (9, 30), (5, 200)):
        model.generate(PROMPT[:, :1].expand(prompts, length), max_new_tokens=length // 4, num_beams=4)
    assert counters["stats"]["unique_graphs"] == 3
    for prompts in (4, 9):
        model.generate(PROMPT.expand(prompts, -1), PADDED.expand(prompts, -1), max_new_tokens=20, num_beams=4)
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]


def test_sampling_and_streaming(compiled: T5) -> None:
    eager = toy()
    sampled = [
        list(model.stream(PROMPT, max_new_tokens=12, do_sample=True, generator=torch.Generator().manual_seed(3)))
        for model in (eager, compiled)
    ]
    assert all(torch.equal(*pair) for pair in zip(*sampled, strict=True))
    start = {"forced_start": (7, 9), "max_new_tokens": 5}
    assert torch.equal(compiled.generate(PROMPT, **start), eager.generate(PROMPT, **start))


def test_a_cache_is_used_again_whatever_it_holds(compiled: T5) -> None:
    expected = compiled.generate(PROMPT, max_new_tokens=9)
    cache = compiled.new_cache(1, 1, 10)
    cache.keys_values.fill_(torch.nan)
    assert torch.equal(compiled.generate(PROMPT, max_new_tokens=9, cache=cache), expected)
    cache.keys_values.fill_(torch.nan)
    assert torch.equal(compiled.generate(PROMPT, max_new_tokens=9, cache=cache), expected)


@pytest.mark.slow
def test_a_prepacked_model_keeps_its_compiled_steps() -> None:
    model = toy()
    options = [{"max_new_tokens": 9}, {"max_new_tokens": 9, "num_beams": 3}]
    expected = [model.generate(PROMPT, **each) for each in options]
    compiled = compile_steps(model, backend="aot_eager")
    if why_not_prepack(compiled) is not None:
        pytest.skip("oneDNN does not pack here")
    compiled = prepack(compiled)
    for _ in range(3):
        assert all(
            torch.equal(compiled.generate(PROMPT, **each), tokens)
            for each, tokens in zip(options, expected, strict=True)
        )


def test_a_damaged_weight_is_named() -> None:
    model = compile_steps(toy(), backend="aot_eager")
    compiled = model.compiled_steps
    with torch.no_grad():
        model.decoder.block[1].layer[1].EncDecAttention.o.weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"decoder\.block\.1\.layer\.1\.EncDecAttention\.o\.weight holds values"):
        generate_guarded(model, PROMPT, max_new_tokens=3)
    assert model.compiled_steps is compiled is not None


def test_mistakes(compiled: T5) -> None:
    with pytest.raises(ValueError, match=r"torch\.float16 on cpu; steps are compiled on the CPU in bfloat16"):
        compile_steps(toy(dtype=torch.float16))
    with pytest.raises(ValueError, match="blocks_at_once=0; it must be at least 1"):
        compile_steps(toy(), 0)
    packed = toy()
    if why_not_prepack(packed) is None:
        with pytest.raises(ValueError, match="prepacked or quantised for this CPU already"):
            compile_steps(prepack(packed))
    with torch.no_grad():
        decoding = Decoding(compiled, compiled.read(PROMPT), compiled.new_cache(1, 1, 100))
    for _ in range(116):
        decoding.step(torch.tensor([[5]]))
    with pytest.raises(ValueError, match="the cache holds 116 tokens and is full"):
        decoding.step(torch.tensor([[5]]))
