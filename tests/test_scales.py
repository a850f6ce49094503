"""Power-of-two scales change nothing in exact arithmetic, and keep float16 in range."""

from __future__ import annotations

import pytest
import torch
from conftest import TOY_CONFIGS, random_state
from hypothesis import given, settings
from hypothesis import strategies as st

from nai_t5_core.facts.config import T5Config, named_config
from nai_t5_core.facts.scales import LayerScales, StackScales, published_scales, scale_for, unscaled
from nai_t5_core.float16.guard import NotFiniteError, ScaleTightenedWarning, encode_guarded, rescale
from nai_t5_core.model.encoder import LAYOUTS, Layout, T5EncoderStack
from nai_t5_core.model.layers import NoInit
from nai_t5_core.weights.fuse import cook, fused_recipes, separate_recipes, unfuse

power = st.integers(-12, 0).map(lambda exponent: 2.0**exponent)
IDS = torch.randint(3, 96, (3, 14), generator=torch.Generator().manual_seed(7))
MASK = torch.arange(14)[None, :] < torch.tensor([14, 5, 9])[:, None]


def scaled_stack(
    config: T5Config,
    state: dict[str, torch.Tensor],
    scales: StackScales | None,
    dtype: torch.dtype = torch.float64,
    layout: Layout = "fused",
) -> T5EncoderStack:
    config = config.encoder_only()
    recipes = fused_recipes(config, scales) if layout == "fused" else separate_recipes(config, scales)
    stack = T5EncoderStack(config, layout, NoInit, scales, device="meta", dtype=dtype)
    stack.load_state_dict({recipe.target: cook(recipe, state.__getitem__, dtype) for recipe in recipes}, assign=True)
    return stack.eval()


@settings(max_examples=15, deadline=None)
@given(data=st.data(), name=st.sampled_from(list(TOY_CONFIGS)), layout=st.sampled_from(LAYOUTS))
@torch.no_grad()
def test_any_scales_give_the_same_in_float64(data: st.DataObject, name: str, layout: Layout) -> None:
    config = TOY_CONFIGS[name].encoder_only()
    layers = [LayerScales(*data.draw(st.tuples(power, power, power))) for _ in range(config.num_layers)]
    scales = StackScales(tuple(layers), data.draw(power))
    state = {name: tensor.double() for name, tensor in random_state(config).items()}
    expected = scaled_stack(config, state, None)(IDS, MASK)
    found = scaled_stack(config, state, scales, layout=layout)(IDS, MASK)
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-12
    back = dict(unfuse(config, scaled_stack(config, state, scales).state_dict().__getitem__, scales))
    assert all(torch.allclose(back[name].double(), state[name], rtol=1e-14) for name in back)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_rescaling_a_built_model_is_building_it_so(config: T5Config, layout: Layout) -> None:
    state = {name: tensor.double() for name, tensor in random_state(config).items()}
    wanted = LayerScales(0.25, 0.125, 0.5)
    stack = scaled_stack(config, state, None, layout=layout)
    rescale(stack, 1, wanted)
    built = scaled_stack(config, state, unscaled(config.num_layers).with_layer(1, wanted), layout=layout)
    assert stack.scales == built.scales
    assert torch.equal(stack(IDS, MASK), built(IDS, MASK))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["feed_forward_out", "hidden", "attention_out"])
@torch.no_grad()
def test_the_guard_mends_an_overflow(kind: str, layout: Layout, where: str) -> None:
    """A sublayer's values beyond float16: refused by nobody, mended once, told once."""
    config = TOY_CONFIGS[kind]
    state = overflowing(config, where)
    if where == "hidden" and not config.can_scale_hidden:
        pytest.skip("no factor passes through this activation")
    reference = scaled_stack(config, state, None, torch.float64)(IDS, MASK)
    stack = scaled_stack(config, state, None, torch.float16, layout)
    assert not torch.isfinite(stack(IDS, MASK)).all()
    with pytest.warns(ScaleTightenedWarning, match=rf"layer 1: .*{where} reaches .*scale 1 tightened to 0\.") as told:
        out = encode_guarded(stack, IDS, MASK)
    assert len(told) == 1
    assert float((out.double() - reference).abs().max() / reference.abs().max()) <= 0.02
    assert torch.equal(encode_guarded(stack, IDS, MASK), out)
    assert getattr(stack.scales.layers[1], where) < 1


def overflowing(config: T5Config, where: str) -> dict[str, torch.Tensor]:
    """Weights whose second layer exceeds float16 in one place, and there alone."""
    state = random_state(config)
    layer = "encoder.block.1.layer"
    up = f"{layer}.1.DenseReluDense.{'wi_1' if config.gated else 'wi'}.weight"
    if where == "feed_forward_out":
        state[f"{layer}.1.DenseReluDense.wo.weight"] *= 1e5
    elif where == "attention_out":
        state[f"{layer}.0.SelfAttention.v.weight"] *= 500
        state[f"{layer}.0.SelfAttention.o.weight"] *= 2000
    else:
        state[up] *= 2e4 if config.gated else 1e5
        state[f"{layer}.1.DenseReluDense.wo.weight"] *= 1e-4
    return state


@torch.no_grad()
def test_what_no_scale_can_mend_is_an_error_with_the_tensors_name() -> None:
    config = TOY_CONFIGS["v1.1"]
    state = random_state(config)
    state["encoder.block.2.layer.0.SelfAttention.v.weight"][3, 3] = float("nan")
    with pytest.raises(NotFiniteError, match=r"encoder.block.2.layer.0.SelfAttention.qkv.weight holds values"):
        encode_guarded(scaled_stack(config, state, None, torch.float16), IDS, MASK)
    state = random_state(config)
    state["shared.weight"][IDS[0, 0]] = float("inf")
    with pytest.raises(NotFiniteError, match=r"shared.weight holds values"):
        encode_guarded(scaled_stack(config, state, None, torch.float32), IDS, MASK)
    stack = scaled_stack(config, random_state(config), None, torch.float32)
    with pytest.raises(NotFiniteError, match="inputs_embeds holds values"):
        encode_guarded(stack, inputs_embeds=torch.full((1, 2, 64), float("nan")))
    state = random_state(config)
    state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"] *= 1e5
    with pytest.raises(
        NotFiniteError, match=r"layer 0 exceeds torch.float16 \(its gate reaches [^,]*, its hidden reaches"
    ):
        encode_guarded(scaled_stack(config, state, None, torch.float16), IDS, MASK)
    state = random_state(config)
    state["encoder.final_layer_norm.weight"] *= 1e6
    with pytest.raises(NotFiniteError, match=r"the output itself exceeds torch.float16"):
        encode_guarded(scaled_stack(config, state, None, torch.float16), IDS, MASK)


def test_scale_leaves_the_headroom() -> None:
    assert scale_for(100.0, 4) == 1
    assert scale_for(65504 / 4, 4) == 1
    assert scale_for(65504, 4) == 0.25
    assert scale_for(65505, 4) == 0.125
    assert scale_for(3e6, 1) == 2**-6


def test_published_table_by_size_and_kind() -> None:
    xxl = published_scales(named_config("t5-v1_1-xxl"))
    assert xxl is not None
    assert [layer.feed_forward_out for layer in xxl.layers] == [1] * 7 + [0.25] * 17
    assert [layer.attention_out for layer in xxl.layers] == [1] * 8 + [0.25] * 16
    small = published_scales(named_config("t5-v1_1-small"))
    assert small is not None
    assert [layer.feed_forward_out for layer in small.layers] == [1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25]
    assert published_scales(named_config("umt5-xxl")) is None
    assert published_scales(named_config("t5-base")) is None


def test_what_is_no_scale_is_refused() -> None:
    for value in (0.3, 2.0, 0.0, -0.5):
        with pytest.raises(ValueError, match=r"hidden=.*power of two, at most 1"):
            LayerScales(hidden=value)
    assert StackScales.from_json(unscaled(3).to_json()) == unscaled(3)
    with pytest.raises(ValueError, match="no scales"):
        StackScales.from_json("[1, 2]")
    with pytest.raises(ValueError, match="scales of 2 layers for a model of 3"):
        T5EncoderStack(TOY_CONFIGS["v1.1"], scales=unscaled(2), device="meta")
