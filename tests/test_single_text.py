"""One text at a time, compiled: the tokens and logits of the eager step, few graphs, and clear refusals."""

from __future__ import annotations

import pytest
import torch
from conftest import TOY_CONFIGS, random_state
from torch._dynamo.utils import counters

from nai_t5_core.attention_choice import missing_for_flex
from nai_t5_core.compiled import compile_single_text
from nai_t5_core.decoding import Decoding
from nai_t5_core.encoder import Layout
from nai_t5_core.generation_guard import generate_guarded
from nai_t5_core.guard import NotFiniteError
from nai_t5_core.model import T5
from nai_t5_core.optimize import can_prepack, prepack
from nai_t5_core.peers import own_t5
from nai_t5_core.single_text import keys_for

MISSING = missing_for_flex(torch.device("cpu"))
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"nothing can be compiled here: {MISSING}")

PROMPT = torch.randint(3, 96, (1, 11), generator=torch.Generator().manual_seed(1))
PADDED = torch.tensor([[1] * 7 + [0] * 4])


def toy(kind: str = "v1.1", dtype: torch.dtype = torch.float32, layout: Layout = "fused") -> T5:
    config = TOY_CONFIGS[kind]
    return own_t5(config, random_state(config), dtype, layout)


def logits_of(model: T5, mask: torch.Tensor | None, tokens: int = 6) -> torch.Tensor:
    """The logits of every step of a text that is the same for all models: [tokens, vocab_size]."""
    with torch.no_grad():
        decoding = Decoding(model, model.read(PROMPT, mask), model.new_cache(1, 1, tokens))
    return torch.cat([decoding.step(torch.tensor([[token]]))[0] for token in range(3, 3 + tokens)])


@pytest.mark.parametrize("kind", ["v1.1", "umt5"])
def test_compiled_equals_eager(kind: str) -> None:
    """With the real compiler; float32, in which only the order of sums differs."""
    eager, compiled = toy(kind), compile_single_text(toy(kind))
    for mask in (None, PADDED):
        expected, found = logits_of(eager, mask), logits_of(compiled, mask)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    options = {"max_new_tokens": 30, "min_new_tokens": 30}
    assert torch.equal(compiled.generate(PROMPT, PADDED, **options), eager.generate(PROMPT, PADDED, **options))


def test_bfloat16_is_no_further_from_float32_than_eager_is() -> None:
    exact = logits_of(toy(), PADDED)
    eager, compiled = toy(dtype=torch.bfloat16), compile_single_text(toy(dtype=torch.bfloat16))
    error, error_of_eager = ((logits_of(model, PADDED) - exact).square().mean().sqrt() for model in (compiled, eager))
    assert 0 < error < 1.1 * error_of_eager


@pytest.mark.parametrize(
    ("kind", "dtype", "layout"),
    [
        ("v1.0", torch.float32, "fused"),
        ("v1.1", torch.float32, "separate"),
        ("umt5", torch.float64, "fused"),
        ("v1.1", torch.float64, "fused"),
    ],
)
def test_every_kind_and_layout(kind: str, dtype: torch.dtype, layout: Layout) -> None:
    """The same graphs without inductor, whose compilation is slow."""
    eager = toy(kind, dtype, layout)
    compiled = compile_single_text(toy(kind, dtype, layout), backend="aot_eager")
    expected, found = logits_of(eager, PADDED), logits_of(compiled, PADDED)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_one_graph_serves_all_blocks_and_all_lengths_up_to_128() -> None:
    model = compile_single_text(toy(), backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    for length in (1, 5, 40, 128):
        model.generate(PROMPT[:, :1].expand(1, length), max_new_tokens=length // 8 + 1)
    # A block, and the head behind the last one.
    assert counters["stats"]["unique_graphs"] == 2
    model.generate(PROMPT[:, :1].expand(1, 129), max_new_tokens=2)
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


def test_keys_come_in_few_numbers() -> None:
    assert [keys_for(length) for length in (1, 128, 129, 256, 257, 5000)] == [128, 128, 256, 256, 512, 8192]


def test_sampling_streaming_and_what_is_not_single() -> None:
    eager, compiled = toy(), compile_single_text(toy(), backend="aot_eager")
    sampled = [
        list(model.stream(PROMPT, max_new_tokens=12, do_sample=True, generator=torch.Generator().manual_seed(3)))
        for model in (eager, compiled)
    ]
    assert all(torch.equal(*pair) for pair in zip(*sampled, strict=True))
    both = PROMPT.expand(2, -1)
    assert torch.equal(compiled.generate(both, max_new_tokens=5), eager.generate(both, max_new_tokens=5))
    beams = {"num_beams": 3, "max_new_tokens": 5}
    assert torch.equal(compiled.generate(PROMPT, **beams), eager.generate(PROMPT, **beams))
    start = {"forced_start": (7, 9), "max_new_tokens": 5}
    assert torch.equal(compiled.generate(PROMPT, **start), eager.generate(PROMPT, **start))


def test_a_cache_is_used_again_whatever_it_holds() -> None:
    model = compile_single_text(toy(), backend="aot_eager")
    expected = model.generate(PROMPT, max_new_tokens=9)
    cache = model.new_cache(1, 1, 10)
    assert cache.length == 128
    cache.keys_values.fill_(torch.nan)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=9, cache=cache), expected)
    cache.keys_values.fill_(torch.nan)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=9, cache=cache), expected)


def test_a_prepacked_model_keeps_its_compiled_step() -> None:
    model = toy()
    expected = model.generate(PROMPT, max_new_tokens=9)
    compiled = compile_single_text(model, backend="aot_eager")
    if not can_prepack(compiled):
        pytest.skip("oneDNN does not pack here")
    compiled = prepack(compiled)
    assert all(torch.equal(compiled.generate(PROMPT, max_new_tokens=9), expected) for _ in range(3))


def test_a_damaged_weight_is_named() -> None:
    model = compile_single_text(toy(), backend="aot_eager")
    compiled = model.single_text
    with torch.no_grad():
        model.decoder.block[1].layer[1].EncDecAttention.o.weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"decoder\.block\.1\.layer\.1\.EncDecAttention\.o\.weight holds values"):
        generate_guarded(model, PROMPT, max_new_tokens=3)
    assert model.single_text is compiled is not None


def test_mistakes() -> None:
    with pytest.raises(
        ValueError, match=r"torch\.float16 on cpu; one text at a time is compiled on the CPU in bfloat16"
    ):
        compile_single_text(toy(dtype=torch.float16))
    packed = toy()
    if can_prepack(packed):
        with pytest.raises(ValueError, match="prepacked or quantised for this CPU already"):
            compile_single_text(prepack(packed))
    model = compile_single_text(toy(), backend="aot_eager")
    with torch.no_grad():
        decoding = Decoding(model, model.read(PROMPT), model.new_cache(1, 1, 128))
    for _ in range(128):
        decoding.step(torch.tensor([[5]]))
    with pytest.raises(ValueError, match="the cache holds 128 tokens and is full"):
        decoding.step(torch.tensor([[5]]))
