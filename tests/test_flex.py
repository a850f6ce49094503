"""Flex attention against SDPA and transformers, compiled for real on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask

from nai_t5_core import load_encoder
from nai_t5_core.model.attention import DocumentAttention
from nai_t5_core.model.attention_choice import AttentionChoice, FlexUnavailableError, missing_for_flex
from nai_t5_core.model.encoder import Layout, T5EncoderStack
from nai_t5_core.model.flex import BLOCK, FlexAttention, packed_attention, visible_blocks
from nai_t5_core.model.packing import PADDING_POLICIES, PaddingPolicy, pack_batch

CPU = torch.device("cpu")
compiled = pytest.mark.skipif(missing_for_flex(CPU) is not None, reason=f"no flex here: {missing_for_flex(CPU)}")

# Largest difference allowed, relative to the largest value. bfloat16 has 8 bits, and the two kernels round differently.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
V1_1 = TOY_CONFIGS["v1.1"]


def masks() -> dict[str, Tensor]:
    """Prompts that fill less than a block, exactly one, several, or end anywhere between."""
    holes = padding_mask([20, 150, 9, 140], 150)
    holes[0, [3, 4, 11]] = 0
    holes[1, 100:130] = 0
    holes[3, 0] = 0
    return {
        "one": padding_mask([37], 37),
        "one of a block": padding_mask([BLOCK], BLOCK),
        "one beyond the reach of the bias": padding_mask([300], 331),
        "right": padding_mask([1, 7, 24, 7], 24),
        "left": padding_mask([1, 7, 24], 24).flip(1),
        "blocks apart": padding_mask([200, 1, 129, 60], 200),
        "many": padding_mask([(7 * index) % 23 + 1 for index in range(40)], 24),
        "holes": holes,
        "a fully masked row": padding_mask([5, 0, 150, 0], 150),
        "all masked": torch.zeros(2, 24, dtype=torch.long),
        "one token": padding_mask([1], 1),
    }


def ids_for(mask: Tensor) -> Tensor:
    return torch.randint(0, V1_1.vocab_size, mask.shape, generator=torch.Generator().manual_seed(1))


def relative_difference(ours: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    largest = float(expected.abs().max()) or 1.0
    return float((ours.float() - expected.float()).abs().max()) / largest


def with_attention(stack: T5EncoderStack, attention: AttentionChoice) -> T5EncoderStack:
    stack.attention = attention
    return stack


Stacks = Callable[[str, torch.dtype, Layout], T5EncoderStack]


@pytest.fixture(scope="module")
def stacks() -> Stacks:
    made: dict[Any, T5EncoderStack] = {}

    def stack_of(kind: str, dtype: torch.dtype = torch.float32, layout: Layout = "fused") -> T5EncoderStack:
        if (kind, dtype, layout) not in made:
            config = TOY_CONFIGS[kind]
            made[kind, dtype, layout] = build_stack(config, random_state(config), dtype, layout)
        return made[kind, dtype, layout]

    return stack_of


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers
# ---------------------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("padding", PADDING_POLICIES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["v1.1", "umt5"])
@torch.no_grad()
def test_equals_sdpa(stacks: Stacks, kind: str, dtype: torch.dtype, padding: PaddingPolicy) -> None:
    stack = stacks(kind, dtype, "fused")
    for name, mask in masks().items():
        ids = ids_for(mask)
        for extra_pad in (0, 2):
            expected = with_attention(stack, "sdpa")(ids, mask, padding=padding, extra_pad=extra_pad)
            ours = with_attention(stack, "flex")(ids, mask, padding=padding, extra_pad=extra_pad)
            assert ours.shape == expected.shape and ours.dtype == dtype
            assert torch.isfinite(ours).all(), name
            assert relative_difference(ours, expected) <= TOLERANCE[dtype], name


@compiled
@torch.no_grad()
def test_equals_sdpa_in_the_separate_layout(stacks: Stacks) -> None:
    stack, mask = stacks("v1.1", torch.float32, "separate"), masks()["holes"]
    expected = with_attention(stack, "sdpa")(ids_for(mask), mask)
    assert relative_difference(with_attention(stack, "flex")(ids_for(mask), mask), expected) <= 1e-5


@compiled
@pytest.mark.parametrize("kind", ["v1.1", "umt5"])
@torch.no_grad()
def test_equals_transformers(stacks: Stacks, kind: str) -> None:
    pytest.importorskip("transformers", reason="transformers is the oracle")
    from nai_t5_core.bench.peers import exact_norms, transformers_encoder

    config, mask = TOY_CONFIGS[kind], masks()["holes"]
    oracle = exact_norms(transformers_encoder(config, random_state(config), torch.float64))
    expected = oracle(ids_for(mask), mask).last_hidden_state
    ours = with_attention(stacks(kind, torch.float32, "fused"), "flex")(ids_for(mask), mask)
    assert relative_difference(ours, expected) <= 1e-5


@compiled
@torch.no_grad()
def test_a_masked_prompt_attends_evenly_to_its_own_rows() -> None:
    groups = pack_batch(torch.tensor([[True] * 5, [False] * 5]), 2, 5).groups
    q, k, v = torch.randn(3, 10, 4, 16).unbind()
    out = FlexAttention.over(groups, 1.0).layer(torch.randn(4, 257))(q, k, v)
    torch.testing.assert_close(out[5:], v[5:].mean(dim=0).expand(5, -1, -1))


@compiled
@torch.no_grad()
def test_lengths_share_one_compilation(stacks: Stacks) -> None:
    """20 batches of random lengths, of one block and of many, compile once."""
    stack = with_attention(stacks("v1.1", torch.float32, "fused"), "flex")
    torch._dynamo.reset()
    counters.clear()
    generator = torch.Generator().manual_seed(6)
    seen = set()
    for _ in range(20):
        batch, length = (int(torch.randint(1, high, (), generator=generator)) for high in (6, 200))
        lengths = torch.randint(0, length + 1, (batch,), generator=generator).tolist()
        mask = padding_mask(lengths, length)
        padding: PaddingPolicy
        for padding in ("skip", "exact"):
            seen.add(stack.prepare(ids_for(mask), mask, padding=padding)[2].tokens)
            stack(ids_for(mask), mask, padding=padding)
    assert len(seen) > 25 and min(seen) < BLOCK and max(seen) > 4 * BLOCK
    assert counters["stats"]["unique_graphs"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# What the kernel is told
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDING_POLICIES)
@pytest.mark.parametrize("pattern", masks())
def test_blocks_are_those_of_the_mask(pattern: str, padding: PaddingPolicy) -> None:
    """Against torch's own way, which makes the whole mask: no visible block is left out, whole ones are exactly so."""
    mask = masks()[pattern].bool()
    batch, length = mask.shape
    packing = pack_batch(mask, batch, length, padding)
    plan = FlexAttention.over(packing.groups, 1.0)
    query, key, *_ = plan.rows

    def is_visible(_: Tensor, __: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return query[i] == key[j]

    theirs = create_block_mask(is_visible, None, None, len(query), len(query), device="cpu")
    ours = visible_blocks(plan.rows)
    assert torch.equal(_chosen(*ours[2:4]), _chosen(theirs.full_kv_num_blocks, theirs.full_kv_indices))
    assert not (_chosen(theirs.kv_num_blocks, theirs.kv_indices) & ~_chosen(*ours[:2])).any()
    needed = int(_chosen(theirs.kv_num_blocks, theirs.kv_indices).sum())
    assert int(_chosen(*ours[:2]).sum()) <= 2 * needed
    for by_query, by_key in ((ours[:2], ours[4:6]), (ours[2:4], ours[6:])):
        assert torch.equal(_chosen(*by_query).t(), _chosen(*by_key))


def _chosen(numbers: Tensor | None, places: Tensor | None) -> Tensor:
    assert numbers is not None and places is not None
    chosen = torch.zeros(places.shape[-2:], dtype=torch.bool)
    for row, (number, columns) in enumerate(zip(numbers[0, 0], places[0, 0], strict=True)):
        chosen[row, columns[:number].long()] = True
    return chosen


@pytest.mark.parametrize("padding", PADDING_POLICIES)
@pytest.mark.parametrize("pattern", masks())
def test_rows_say_what_each_query_sees(pattern: str, padding: PaddingPolicy) -> None:
    mask = masks()[pattern].bool()
    batch, length = mask.shape
    packing = pack_batch(mask, batch, length, padding)
    plan = FlexAttention.over(packing.groups, 1.0)
    query, key, position, even = plan.rows
    place = torch.arange(batch * length) if packing.index is None else packing.index
    prompt, expected_position = place // length, place % length
    is_key = torch.ones_like(mask) if padding == "attend" else mask
    is_key = is_key | ~is_key.any(dim=1, keepdim=True)
    expected = (prompt[:, None] == prompt[None, :]) & is_key.flatten()[place]
    tokens = packing.tokens
    assert torch.equal(query[:tokens, None] == key[None, :tokens], expected)
    assert not (query[tokens:, None] == key[None, :]).any() and not (query[:, None] == key[None, tokens:]).any()
    is_masked = ~mask.any(dim=1)[prompt] if padding == "exact" else torch.zeros_like(prompt, dtype=torch.bool)
    assert torch.equal(even[:tokens], is_masked.int()) and not even[tokens:].any()
    for number in prompt.unique():
        own, expected = position[:tokens][prompt == number], expected_position[prompt == number]
        assert torch.equal(own - own[0], torch.where(is_masked[prompt == number], 0, expected - expected[0]).int())


@pytest.fixture
def captured() -> Iterator[tuple[list[torch.fx.GraphModule], Callable[..., Any]]]:
    """A backend of torch.compile that keeps the graphs and runs them as they are."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    yield graphs, backend
    torch._dynamo.reset()


def _calls(graph: torch.fx.GraphModule, name: str) -> list[torch.fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function" and name in str(node.target)]


@pytest.mark.parametrize("attention", ["flex", "sdpa"])
@pytest.mark.parametrize("kind", ["v1.1", "umt5"])
@torch.no_grad()
def test_the_whole_encoder_is_one_graph(stacks: Stacks, captured: Any, kind: str, attention: AttentionChoice) -> None:
    graphs, backend = captured
    stack, mask = stacks(kind, torch.float32, "fused"), masks()["holes"]
    expected = with_attention(stack, "sdpa")(ids_for(mask), mask)
    if attention == "flex" and missing_for_flex(CPU):
        pytest.skip(f"no flex here: {missing_for_flex(CPU)}")
    embeddings, plan, packing = with_attention(stack, attention).prepare(ids_for(mask), mask)
    encode = torch.compile(stack.encoder, fullgraph=True, backend=backend)
    assert relative_difference(packing.unpack(encode(embeddings, plan, stack.dtype)), expected) <= 1e-5
    name = "flex_attention" if attention == "flex" else "scaled_dot_product_attention"
    calls = _calls(graphs[0], name)
    assert len(graphs) == 1 and len(calls) == V1_1.num_layers * (1 if attention == "flex" else len(packing.groups))


@compiled
@torch.no_grad()
def test_scale_and_kernel_options_reach_the_kernel(captured: Any) -> None:
    graphs, backend = captured
    groups = pack_batch(None, 2, 20).groups
    plan = FlexAttention.over(groups, 0.25, kernel_options={"BLOCK_M": 64})
    q, k, v = torch.randn(3, 40, 4, 16).unbind()
    table = torch.randn(4, 257)
    out = torch.compile(plan.layer(table), fullgraph=True, backend=backend)(q, k, v)
    torch.testing.assert_close(out, DocumentAttention(groups, 0.25).layer(table)(q, k, v))
    options = [argument for argument in _calls(graphs[0], "flex_attention")[0].args if isinstance(argument, dict)]
    assert options[0]["BLOCK_M"] == 64


@pytest.mark.parametrize("pattern", masks())
def test_the_plan_lies_on_the_device(pattern: str) -> None:
    """Holes are told by tensors on the device: a mixture would be an error on meta, which has no numbers to copy."""
    mask = masks()[pattern].bool()
    batch, length = mask.shape
    _, packing = pack_batch(mask, batch, length).pack_onto(torch.device("meta"), torch.ones(batch, length).long())
    plan = FlexAttention.over(packing.groups, 1.0, "meta")
    assert {tensor.device.type for tensor in (plan.rows, *plan.blocks)} == {"meta"}


@compiled
@torch.no_grad()
def test_stack_hands_its_kernel_options_on() -> None:
    config = V1_1.encoder_only()
    stack = T5EncoderStack(config, dtype=torch.float32, attention="flex", kernel_options={"BLOCK_N": 32})
    plan = stack.prepare(torch.ones(1, 9, dtype=torch.long))[1]
    assert isinstance(plan, FlexAttention) and plan.kernel_options == {"BLOCK_N": 32}


# ---------------------------------------------------------------------------------------------------------------------
# Never uncompiled, never without a word
# ---------------------------------------------------------------------------------------------------------------------


@compiled
@torch.no_grad()
def test_uncompiled_is_an_error() -> None:
    plan = FlexAttention.over(pack_batch(None, 2, 20).groups, 1.0)
    q, k, v = torch.randn(3, 40, 4, 16).unbind()
    table = torch.randn(4, 257)
    with pytest.raises(RuntimeError, match=r"torch did not compile it.*attention='sdpa'"):
        packed_attention(q, k, v, table, plan.rows, plan.blocks, 1.0, None)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="torch did not compile it"):
        plan.layer(table)(q, k, v)


@compiled
@torch.no_grad()
def test_too_many_variants_are_an_error(stacks: Stacks) -> None:
    """Beyond torch's limit of compilations it would run what is not compiled; here it refuses."""
    ids = torch.ones(1, 9, dtype=torch.long)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        with_attention(stacks("v1.1", torch.float32, "fused"), "flex")(ids)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            with_attention(stacks("v1.1", torch.bfloat16, "fused"), "flex")(ids)
    torch._dynamo.reset()


@pytest.fixture
def no_compiler() -> Iterator[None]:
    with torch._inductor.config.patch({"cpp.cxx": (None, "/absent/g++")}):
        yield


@compiled
def test_without_a_compiler_loading_warns_once_and_takes_sdpa(no_compiler: None) -> None:
    with pytest.warns(UserWarning, match=r"attention='flex' is not possible.*no C\+\+ compiler.*'sdpa'") as warned:
        stack = load_encoder(dtype="float32", device="cpu", attention="flex")
    assert len(warned) == 1 and warned[0].filename == __file__
    assert stack.attention == "sdpa" and "attention=sdpa" in repr(stack)
    assert isinstance(stack.prepare(torch.ones(1, 9, dtype=torch.long))[1], DocumentAttention)


@compiled
def test_without_a_compiler_a_stack_that_wants_flex_refuses(stacks: Stacks, no_compiler: None) -> None:
    stack = with_attention(stacks("v1.1", torch.float32, "fused"), "flex")
    with pytest.raises(FlexUnavailableError, match=r"no C\+\+ compiler \(install g\+\+.*use attention='sdpa'"):
        stack(torch.ones(1, 9, dtype=torch.long))


def test_what_flex_cannot_do_is_refused(stacks: Stacks) -> None:
    ids = torch.ones(1, 9, dtype=torch.long)
    with pytest.raises(ValueError, match=r"unknown attention 'flash'; allowed: auto, flex, sdpa"):
        T5EncoderStack(V1_1, attention="flash")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"in torch.float64; allowed: float32, bfloat16, float16; use attention='sdpa'"
    ):
        load_encoder(dtype="float64", device="cpu", attention="flex")
    stack = with_attention(stacks("v1.1", torch.float64, "fused"), "flex")
    with pytest.raises(ValueError, match=r"in torch.float64"):
        stack(ids)
    stack = with_attention(stacks("v1.1", torch.float32, "fused"), "flex")
    with pytest.raises(ValueError, match=r"the mask has 3 dimensions; attention='flex' takes \[batch, length\]"):
        stack(ids, torch.ones(1, 9, 9, dtype=torch.bool))
    with torch.device("meta"), pytest.raises(ValueError, match=r"the model is on meta; allowed: cpu, cuda"):
        T5EncoderStack(V1_1, attention="flex")(ids.to("meta"))


@compiled
def test_gradients_on_the_cpu_come_through_sdpa(stacks: Stacks) -> None:
    """torch's flex attention has no backward there; if a version has one, the fallback in document_plan can go."""
    mask = masks()["holes"]
    stack = with_attention(build_stack(V1_1, random_state(V1_1)), "flex")
    assert isinstance(stack.prepare(ids_for(mask), mask)[1], DocumentAttention)
    stack.requires_grad_(True)(ids_for(mask), mask).float().square().mean().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in stack.parameters() if weight.grad is not None)
    gradients = {name: weight.grad for name, weight in stack.named_parameters()}
    bias = gradients["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert bias is not None and bias.abs().sum() > 0

    q, k, v = torch.randn(3, 40, 4, 16, requires_grad=True).unbind()
    plan = FlexAttention.over(pack_batch(None, 2, 20).groups, 1.0)
    with pytest.raises(Exception, match="does not support backward on CPU"):
        plan.layer(torch.randn(4, 257))(q, k, v)
