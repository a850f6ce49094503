"""The compiled encoder: one graph per bucket whatever the lengths, and the numbers of the eager one."""

from __future__ import annotations

import pickle
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from torch._dynamo.utils import counters

from nai_t5_core.backends.choose import prepack, why_not_prepack
from nai_t5_core.backends.compile_limit import GRAPHS_ARE_SEPARATE
from nai_t5_core.backends.compiled import compile_stack, warm_up
from nai_t5_core.facts.config import T5Config
from nai_t5_core.float16.guard import NotFiniteError, guard
from nai_t5_core.model.attention_choice import missing_for_flex
from nai_t5_core.model.packing import PADDING_POLICIES, TOKEN_BUCKETS, PaddingPolicy, bucket_for
from nai_t5_core.prompts.text_encoder import TextEncoder

# A second layer is compiled with the first; every further one would only take its time.
V1_1, UMT5 = (TOY_CONFIGS[kind].encoder_only().model_copy(update={"num_layers": 2}) for kind in ("v1.1", "umt5"))
MISSING = missing_for_flex(torch.device("cpu"))
needs_compiler = pytest.mark.skipif(MISSING is not None, reason=f"nothing can be compiled here: {MISSING}")


def random_prompts(generator: torch.Generator, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch = int(torch.randint(1, 4, (), generator=generator))
    lengths = torch.randint(1, longest + 1, (batch,), generator=generator).tolist()
    ids = torch.randint(3, 96, (batch, longest), generator=generator)
    return ids, padding_mask(lengths, longest)


@needs_compiler
@torch.no_grad()
def test_two_hundred_prompts_compile_once_per_bucket() -> None:
    stack = build_stack(V1_1, random_state(V1_1))
    eager = build_stack(V1_1, random_state(V1_1))
    buckets = (128, 256, 384)
    torch._dynamo.reset()
    counters.clear()
    # Without inductor, whose compilation is slow; how often there is one is dynamo's doing.
    compile_stack(stack, buckets=buckets, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    used = set()
    for number in range(200):
        ids, mask = random_prompts(generator, 120)
        padding: PaddingPolicy = "skip" if number % 3 else "exact"
        out = stack(ids, mask, padding=padding)
        used.add(bucket_for(int(mask.sum()) if padding == "skip" else ids.numel(), buckets))
        if number % 20 == 0:
            assert torch.allclose(out, eager(ids, mask, padding=padding), atol=1e-5)
    assert used == set(buckets)
    assert counters["stats"]["unique_graphs"] == len(buckets)
    assert not counters["graph_break"]


@needs_compiler
@pytest.mark.parametrize("config", [V1_1, UMT5], ids=["v1.1", "umt5"])
@torch.no_grad()
def test_compiled_equals_eager(config: T5Config) -> None:
    """With the real compiler, one bucket; float32, in which only the order of sums differs."""
    state = random_state(config)
    stack, eager = (build_stack(config, state) for _ in range(2))
    compile_stack(stack, buckets=(128,))
    assert warm_up(stack) == (128,)
    ids = torch.randint(3, 96, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = padding_mask([40, 0, 7], 40)
    mask[0, 5:9] = 0
    for padding in PADDING_POLICIES:
        expected = eager(ids, mask, padding=padding)
        out = stack(ids, mask, padding=padding)
        assert float((out - expected).abs().max() / expected.abs().max()) < 1e-5, padding
    dense = torch.ones(3, 40, 40, dtype=torch.bool).tril()
    assert torch.equal(stack(ids, dense), eager(ids, dense))
    states, expected_states = stack.hidden_states(ids, mask), eager.hidden_states(ids, mask)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(states, expected_states, strict=True))


def test_buckets_grow_by_at_most_a_half() -> None:
    assert [bucket_for(tokens) for tokens in (0, 1, 128, 129, 512, 513, 8192, 8193, 20000)] == [
        *(128, 128, 128, 256, 512, 768, 8192, 16384, 24576)
    ]
    assert all(after <= 2 * before for before, after in pairwise(TOKEN_BUCKETS))


@needs_compiler
def test_what_cannot_be_compiled_is_refused() -> None:
    state = random_state(V1_1)
    for buckets in ((), (100,), (256, 128), (128, 128)):
        with pytest.raises(ValueError, match="must be rising multiples of 128"):
            compile_stack(build_stack(V1_1, state), buckets=buckets)
    with pytest.raises(ValueError, match=r"the model is in torch\.float64"):
        compile_stack(build_stack(V1_1, state, torch.float64))
    with pytest.raises(ValueError, match="the model is not compiled"):
        warm_up(build_stack(V1_1, state))
    packed = build_stack(V1_1, state)
    if why_not_prepack(packed) is None:
        with pytest.raises(ValueError, match="prepacked or quantised"):
            compile_stack(prepack(packed))


@needs_compiler
def test_text_encoder_shows_that_it_is_compiled() -> None:
    encoder = TextEncoder.from_pretrained(dtype="float32", compile=True)
    assert "attention=auto: flex, compiled" in repr(encoder.stack)


@needs_compiler
@torch.no_grad()
def test_the_guard_names_the_weight_of_a_compiled_encoder() -> None:
    stack = compile_stack(build_stack(V1_1, random_state(V1_1)), buckets=(128,), backend="eager")
    stack.guard = guard
    ids = torch.tensor([[5, 6, 1]])
    assert stack(ids).isfinite().all()
    stack.encoder.block[1].layer[1].DenseReluDense.wo.weight[3, 4] = torch.nan
    with pytest.raises(NotFiniteError, match=r"encoder\.block\.1\.layer\.1\.DenseReluDense\.wo\.weight"):
        stack(ids)


@needs_compiler
@torch.no_grad()
def test_a_copy_is_compiled_for_itself() -> None:
    stack = compile_stack(build_stack(V1_1, random_state(V1_1)), buckets=(128,), backend="eager")
    ids = torch.tensor([[5, 6, 1]])
    expected = stack(ids)
    for copy in (deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        counters.clear()
        stack.shared.weight.zero_()
        assert torch.equal(copy(ids), expected)
        assert counters["stats"]["unique_graphs"] == GRAPHS_ARE_SEPARATE
