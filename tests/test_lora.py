"""LoRA on our encoders, merged and live, against the same LoRA on transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import encoder_part
from conftest import TOY_CONFIGS, build_stack, random_state
from lora_oracle import (
    KINDS,
    MASK,
    V1_1,
    assert_near,
    assert_same_weights,
    ids_for,
    ours,
    reference,
    scaled_stack,
    snapshot,
    v1_1_stack,
)
from toy_loras import projections, toy_lora

from nai_t5_core.bench.peers import transformers_encoder
from nai_t5_core.float16.guard import ScaleTightenedWarning, encode_guarded
from nai_t5_core.lora.changes import LowRankChange
from nai_t5_core.lora.files import Lora
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.lora.loras import Loras
from nai_t5_core.lora.set import LoraSet
from nai_t5_core.model.encoder import LAYOUTS, Layout


@pytest.fixture(params=[Loras, LiveLoras])
def loras_of(request: pytest.FixtureRequest) -> type[LoraSet]:
    kind: type[LoraSet] = request.param
    return kind


# ---------------------------------------------------------------------------------------------------------------------
# The same as on the unfused reference
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_projection(kind: str, layout: Layout, loras_of: type[LoraSet]) -> None:
    config = TOY_CONFIGS[kind]
    stack, lora = build_stack(config, random_state(config), layout=layout), toy_lora(config)
    assert lora.changes.keys() == projections(config).keys()
    loras_of(stack).add(lora, 0.7)
    expected = reference(config, (lora, 0.7))
    assert_near(ours(stack), expected)
    plain = reference(config)
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max(), "the LoRA makes no difference"


@pytest.mark.parametrize("target", ["q", "k", "v", "o", "wi_0", "wi_1", "wo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_projection(target: str, layout: Layout, loras_of: type[LoraSet]) -> None:
    """Rows at the right place of the fused weight, and no others."""
    stack, lora = v1_1_stack(layout), toy_lora(V1_1, targets=(target,))
    assert len(lora.changes) == V1_1.num_layers
    loras_of(stack).add(lora)
    assert_near(ours(stack), reference(V1_1, (lora, 1.0)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_float16_scales(kind: str, layout: Layout, loras_of: type[LoraSet]) -> None:
    """Scales at every place change nothing: in float32 to its rounding, in float16 to that."""
    config = TOY_CONFIGS[kind]
    lora = toy_lora(config)
    stack = scaled_stack(config, torch.float32, layout)
    loras_of(stack).add(lora, 0.7)
    expected = reference(config, (lora, 0.7))
    assert_near(ours(stack), expected)
    half = scaled_stack(config, torch.float16, layout)
    loras_of(half).add(lora, 0.7)
    assert_near(ours(half), expected, 2e-2)


def test_bfloat16_and_float64(loras_of: type[LoraSet]) -> None:
    lora = toy_lora(V1_1)
    expected = reference(V1_1, (lora, 1.0))
    for dtype, tolerance in ((torch.bfloat16, 5e-2), (torch.float64, 1e-5)):
        stack = v1_1_stack(dtype=dtype)
        loras_of(stack).add(lora)
        assert {weight.dtype for name, weight in stack.named_parameters() if "qkv" in name} == {dtype}
        assert_near(ours(stack), expected, tolerance)


def test_a_norm_weight_of_zero_stays_zero(loras_of: type[LoraSet]) -> None:
    """What it hides of the original, it hides of the change."""
    state = random_state(V1_1)
    state["encoder.block.1.layer.0.layer_norm.weight"][:7] = 0
    lora = toy_lora(V1_1, targets=("q", "v"))
    fused, separate = build_stack(V1_1, state), build_stack(V1_1, state, layout="separate")
    for stack in (fused, separate):
        loras_of(stack).add(lora)
    assert_near(ours(fused), ours(separate))


def test_the_drop_in_class(loras_of: type[LoraSet]) -> None:
    pytest.importorskip("transformers")
    from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel

    lora = toy_lora(V1_1)
    for layout in LAYOUTS:
        source = transformers_encoder(V1_1.encoder_only(), encoder_part(random_state(V1_1)), torch.float32)
        model = NAIT5EncoderModel.from_hf(source, layout=layout)
        loras = loras_of(model)
        loras.add(lora, 0.5)
        with torch.no_grad():
            assert_near(model(ids_for(V1_1), MASK)[0], reference(V1_1, (lora, 0.5)))
            # The separate layout shares its tensors with the source, which must not change.
            assert_near(source(ids_for(V1_1), MASK)[0], reference(V1_1), 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Several, strengths, and out again
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_at_once(layout: Layout, loras_of: type[LoraSet]) -> None:
    stack = v1_1_stack(layout)
    first, second = toy_lora(V1_1, 1, ("q", "k", "wi_0"), "first"), toy_lora(V1_1, 2, ("k", "wi_1", "o"), "second")
    loras = loras_of(stack)
    assert (loras.add(first), loras.add(second, -0.5)) == ("first", "second")
    assert loras.strengths == {"first": 1.0, "second": -0.5}
    assert_near(ours(stack), reference(V1_1, (first, 1.0), (second, -0.5)))
    loras.set_strength("first", 0.25)
    assert_near(ours(stack), reference(V1_1, (first, 0.25), (second, -0.5)))
    loras.remove("second")
    assert_near(ours(stack), reference(V1_1, (first, 0.25)))
    assert repr(loras) == f"{loras_of.__name__}(first: 0.25; {6 if layout == 'fused' else 9} weights changed)"


def test_a_lora_that_overflows_float16_is_guarded(loras_of: type[LoraSet]) -> None:
    stack = v1_1_stack(dtype=torch.float16)
    lora = toy_lora(V1_1, targets=("wo",))
    with pytest.warns(ScaleTightenedWarning):
        loras = loras_of(stack)
        loras.add(lora, 30_000.0)
        out = encode_guarded(stack, ids_for(V1_1), MASK)
    assert_near(out, reference(V1_1, (lora, 30_000.0)), 2e-2)
    loras.clear()
    assert_near(ours(stack), reference(V1_1), 2e-2)


def test_a_copy_is_a_model_of_its_own(loras_of: type[LoraSet]) -> None:
    stack, lora = v1_1_stack(), toy_lora(V1_1)
    loras = loras_of(stack)
    loras.add(lora)
    twin = copy.deepcopy(stack)
    loras.clear()
    assert_near(ours(twin), reference(V1_1, (lora, 1.0)))


# ---------------------------------------------------------------------------------------------------------------------
# Misuse
# ---------------------------------------------------------------------------------------------------------------------


def test_a_lora_for_another_t5_changes_nothing(loras_of: type[LoraSet]) -> None:
    stack = v1_1_stack()
    before = snapshot(stack)
    loras = loras_of(stack)
    with pytest.raises(
        ValueError, match=r"(?s)another T5 than this T5 v1.1.*DenseReluDense.wi.weight: the model has no"
    ):
        loras.add(toy_lora(TOY_CONFIGS["v1.0"]))
    odd = Lora(
        "odd",
        {"encoder.block.0.layer.0.SelfAttention.q.weight": LowRankChange(torch.ones(64, 2), torch.ones(2, 32), 1.0)},
    )
    with pytest.raises(ValueError, match=r"a change of shape \[64, 32\] for a weight of shape \[64, 64\]"):
        loras.add(odd)
    assert loras.strengths == {}
    assert_same_weights(stack, before)


def test_names_and_strengths(loras_of: type[LoraSet]) -> None:
    loras = loras_of(v1_1_stack())
    loras.add(toy_lora(V1_1))
    with pytest.raises(ValueError, match="there is a LoRA 'toy' already"):
        loras.add(toy_lora(V1_1))
    with pytest.raises(ValueError, match="there is no LoRA 'toi'; there are: toy"):
        loras.remove("toi")
    with pytest.raises(ValueError, match="strength=nan; it must be a finite number"):
        loras.set_strength("toy", float("nan"))
    assert loras.strengths == {"toy": 1.0}
