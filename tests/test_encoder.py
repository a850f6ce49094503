"""The encoder against transformers in float32 and float64, on toys of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from torch import Tensor

from nai_t5_core.facts.config import T5Config
from nai_t5_core.model.encoder import LAYOUTS, Layout, T5EncoderStack
from nai_t5_core.model.packing import PaddingPolicy

pytest.importorskip("transformers", reason="transformers is the oracle")
from nai_t5_core.bench.peers import exact_norms, transformers_encoder

# Largest difference allowed, relative to the largest value of the reference.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
LENGTH = 24


def masks() -> dict[str, Tensor]:
    """Every pattern of a 2-dim mask that users produce."""
    holes = padding_mask([20, 24, 9], LENGTH)
    holes[0, [3, 4, 11]] = 0
    holes[2, 0] = 0
    some_empty = padding_mask([5, 0, 24], LENGTH)
    return {
        "right": padding_mask([1, 7, 24, 7], LENGTH),
        "left": padding_mask([1, 7, 24], LENGTH).flip(1),
        "holes": holes,
        "a fully masked row": some_empty,
        "all masked": torch.zeros(2, LENGTH, dtype=torch.long),
    }


def reference(config: T5Config, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """transformers' encoder. Its norms compute in float32 even in a float64 model, so float64 needs exact ones."""
    return exact_norms(transformers_encoder(config, state, dtype))


def ids_for(config: T5Config, mask: Tensor) -> Tensor:
    return torch.randint(0, config.vocab_size, mask.shape, generator=torch.Generator().manual_seed(1))


def relative_difference(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("pattern", masks())
@torch.no_grad()
def test_masked_batch(config: T5Config, dtype: torch.dtype, layout: Layout, pattern: str) -> None:
    """exact: every row as the reference has it. skip: real rows equal, the others zero."""
    state, mask = random_state(config), masks()[pattern]
    ids = ids_for(config, mask)
    expected = reference(config, state, dtype)(ids, mask).last_hidden_state
    stack = build_stack(config, state, dtype, layout)

    assert relative_difference(stack(ids, mask), expected) <= TOLERANCE[dtype]
    skipped = stack(ids, mask, padding="skip")
    real = mask.bool()
    assert torch.equal(skipped[~real], torch.zeros_like(skipped[~real]))
    if real.any():
        assert relative_difference(skipped[real], expected[real]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_without_mask(config: T5Config, dtype: torch.dtype, layout: Layout) -> None:
    """No mask, and the attend policy with one, treat pad tokens as ordinary tokens."""
    state, mask = random_state(config), masks()["right"]
    ids = ids_for(config, mask)
    expected = reference(config, state, dtype)(ids).last_hidden_state
    stack = build_stack(config, state, dtype, layout)
    assert relative_difference(stack(ids), expected) <= TOLERANCE[dtype]
    assert relative_difference(stack(ids, mask, padding="attend"), expected) <= TOLERANCE[dtype]


@torch.no_grad()
def test_beyond_the_reach_of_the_bias(config: T5Config) -> None:
    """300 tokens: distances above 128 share a bucket."""
    state = random_state(config)
    ids = torch.randint(0, config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(2))
    expected = reference(config, state, torch.float64)(ids).last_hidden_state
    assert relative_difference(build_stack(config, state, torch.float64)(ids), expected) <= 1e-10


@torch.no_grad()
def test_trim_is_skip_cut_to_the_longest(config: T5Config) -> None:
    stack, mask = build_stack(config, random_state(config)), padding_mask([3, 11], LENGTH)
    ids = ids_for(config, mask)
    assert torch.equal(stack(ids, mask, padding="trim"), stack(ids, mask, padding="skip")[:, :11])


@torch.no_grad()
def test_extra_pad_computes_that_pad_row_as_the_reference_does(config: T5Config) -> None:
    state, mask = random_state(config), padding_mask([3, 24, 23], LENGTH)
    ids = ids_for(config, mask)
    expected = reference(config, state, torch.float64)(ids, mask).last_hidden_state
    ours = build_stack(config, state, torch.float64)(ids, mask, padding="skip", extra_pad=1)
    computed = padding_mask([4, 24, 24], LENGTH).bool()
    assert relative_difference(ours[computed], expected[computed]) <= 1e-10
    assert not ours[~computed].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.uint8])
@torch.no_grad()
def test_padding_mask_of_any_dtype(dtype: torch.dtype) -> None:
    config = TOY_CONFIGS["v1.1"]
    stack, mask = build_stack(config, random_state(config)), masks()["holes"]
    ids = ids_for(config, mask)
    assert torch.equal(stack(ids, mask.to(dtype)), stack(ids, mask))


@torch.no_grad()
def test_packing_mask_of_three_dimensions(config: T5Config) -> None:
    """Two prompts in one row, told apart by a [batch, query, key] mask; the reference wants a head dimension in it."""
    state = random_state(config)
    document = torch.tensor([[0] * 9 + [1] * 15, [0] * 20 + [1] * 4])
    mask = document[:, :, None] == document[:, None, :]
    ids = ids_for(config, document)
    theirs = reference(config, state, torch.float64)
    if not theirs._supports_sdpa:
        pytest.skip("the T5 of transformers 4 takes masks [batch, key] alone")
    expected = theirs(ids, mask[:, None]).last_hidden_state
    stack = build_stack(config, state, torch.float64)
    assert relative_difference(stack(ids, mask), expected) <= 1e-10
    assert relative_difference(stack(ids, mask[:, None]), expected) <= 1e-10
    assert relative_difference(stack(ids, mask[:, None].long().expand(-1, config.num_heads, -1, -1)), expected) <= 1e-10


@torch.no_grad()
def test_a_query_masked_everywhere_attends_evenly(config: T5Config) -> None:
    state = random_state(config)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    mask[..., 4, :] = False
    ids = ids_for(config, mask[:, 0, 0])
    stack = build_stack(config, state, torch.float64)
    out = stack(ids, mask)
    assert torch.isfinite(out).all()
    # By hand: values of all tokens weigh the same for that query; one layer is enough to see it.
    block = stack.encoder.block[0].layer[0]
    hidden = block.layer_norm(stack.shared(ids[0]))
    value = block.SelfAttention.qkv(hidden).chunk(3, dim=-1)[2].mean(dim=0)
    first = stack.hidden_states(ids, mask)[0][0, 4] + block.SelfAttention.o(value)
    feed_forward = stack.encoder.block[0].layer[1]
    expected = first + feed_forward.DenseReluDense(feed_forward.layer_norm(first))
    assert relative_difference(stack.hidden_states(ids, mask)[1][0, 4], expected) <= 1e-10


@torch.no_grad()
def test_embeddings_in_place_of_ids(config: T5Config) -> None:
    stack, mask = build_stack(config, random_state(config)), masks()["right"]
    ids = ids_for(config, mask)
    padding: PaddingPolicy
    for padding in ("exact", "skip"):
        assert torch.equal(
            stack(inputs_embeds=stack.shared(ids), attention_mask=mask, padding=padding),
            stack(ids, mask, padding=padding),
        )


@torch.no_grad()
def test_hidden_states_of_every_layer(config: T5Config) -> None:
    state, mask = random_state(config), masks()["holes"]
    ids = ids_for(config, mask)
    model = reference(config, state, torch.float64)
    expected = model(ids, mask, output_hidden_states=True).hidden_states
    stack = build_stack(config, state, torch.float64)
    ours = stack.hidden_states(ids, mask)
    assert len(ours) == len(expected) == config.num_layers + 1
    for layer, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
        assert relative_difference(mine, theirs) <= 1e-10, layer
    raw = stack.hidden_states(ids, mask, final_norm=False)[-1]
    assert relative_difference(stack.encoder.final_layer_norm(raw), ours[-1]) <= 1e-12


@torch.no_grad()
def test_same_prompt_in_any_batch_and_any_padding(config: T5Config) -> None:
    """float32: the same embedding to 1e-6 whatever stands beside it and however long the padding is."""
    stack = build_stack(config, random_state(config))
    prompt = torch.randint(3, config.vocab_size, (9,), generator=torch.Generator().manual_seed(3))
    alone = stack(prompt[None])[0]
    for length in (9, 16, 33, 130):
        for others in (0, 1, 5):
            ids = torch.randint(3, config.vocab_size, (others + 1, length), generator=torch.Generator().manual_seed(4))
            ids[-1, :9] = prompt
            mask = padding_mask([*range(1, others + 1), 9], length)
            padding: PaddingPolicy
            for padding in ("exact", "skip", "trim"):
                out = stack(ids, mask, padding=padding)[-1, :9]
                assert relative_difference(out, alone) <= 1e-6, (length, others, padding)


@torch.no_grad()
def test_scaled_queries(config: T5Config) -> None:
    """scale_qk divides the logits by √d_kv, which is the same as smaller queries."""
    state = random_state(config)
    scaled = build_stack(config.model_copy(update={"scale_qk": True}), state, torch.float64)
    smaller = {name: w * config.d_kv**-0.5 if name.endswith(".q.weight") else w for name, w in state.items()}
    ids = torch.randint(0, config.vocab_size, (2, 12))
    smaller_stack = build_stack(config, {k: v.double() for k, v in smaller.items()}, torch.float64)
    assert relative_difference(scaled(ids), smaller_stack(ids)) <= 1e-6
    assert relative_difference(scaled(ids), build_stack(config, state, torch.float64)(ids)) > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initialisation_is_reproducible_and_of_order_one(config: T5Config, layout: Layout) -> None:
    def initialised() -> T5EncoderStack:
        stack = T5EncoderStack(config.encoder_only(), layout, dtype=torch.float32)
        stack.init_weights(torch.Generator().manual_seed(5))
        return stack

    first, second = initialised(), initialised()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    out = first(torch.randint(0, config.vocab_size, (2, 16)))
    assert 0.5 < float(out.detach().std()) < 2
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in first.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_half_precisions_keep_the_residual_in_float32(config: T5Config, layout: Layout) -> None:
    state = random_state(config)
    ids = torch.randint(0, config.vocab_size, (2, 12))
    expected = build_stack(config, state, torch.float64, layout)(ids)
    for dtype, tolerance in ((torch.bfloat16, 5e-2), (torch.float16, 5e-3)):
        stack = build_stack(config, state, dtype, layout)
        out = stack(ids)
        assert out.dtype == dtype
        assert relative_difference(out.double(), expected) <= tolerance
        assert {hidden.dtype for hidden in stack.hidden_states(ids)[:-1]} == {torch.float32}


def test_output_may_be_written_in_place() -> None:
    config = TOY_CONFIGS["v1.1"]
    stack, ids = build_stack(config, random_state(config)), torch.randint(0, 96, (2, 8))
    with torch.no_grad():
        first = stack(ids)
        kept = first.clone()
        first.zero_()
        assert torch.equal(stack(ids), kept)


def test_bad_input_is_refused() -> None:
    config = TOY_CONFIGS["v1.1"]
    stack, ids = build_stack(config, random_state(config)), torch.randint(0, 96, (2, 8))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        stack()
    with pytest.raises(ValueError, match="token id 96 is outside the vocabulary of 96"):
        stack(torch.full((1, 4), 96))
    with pytest.raises(ValueError, match="token id -1"):
        stack(torch.full((1, 4), -1))
    with pytest.raises(ValueError, match=r"\[batch, length\]; got shape \[8\]"):
        stack(ids[0])
    with pytest.raises(ValueError, match=r"d_model=64; got shape \[2, 8, 63\]"):
        stack(inputs_embeds=torch.zeros(2, 8, 63))
    with pytest.raises(ValueError, match=r"shape \[2, 7\].*\[2, 8\]"):
        stack(ids, torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"shape \[2, 8, 7\]; allowed: \[2, 8\], \[2, 8, 8\]"):
        stack(ids, torch.ones(2, 8, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be bool or integer"):
        stack(ids, torch.ones(2, 8, 8))
    with pytest.raises(ValueError, match="unknown layout 'flat'"):
        T5EncoderStack(config, "flat")  # type: ignore[arg-type]
