"""The drop-in class against transformers' own, on the same weights: every way to call it, in every dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, padding_mask
from hf_toys import MASK, V1_1_IDS, assert_near, hf_model, ids_for
from torch import Tensor, nn

from nai_t5_core.bench.stress import stress_state
from nai_t5_core.facts.config import T5Config
from nai_t5_core.float16.guard import NotFiniteError, ScaleTightenedWarning
from nai_t5_core.weights.formats import CheckpointError

pytest.importorskip("transformers")

from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel


@pytest.fixture
def reference(config: T5Config) -> nn.Module:
    return hf_model(config)


@pytest.fixture
def v1_1() -> NAIT5EncoderModel:
    return NAIT5EncoderModel.from_hf(hf_model(TOY_CONFIGS["v1.1"]))


# ---------------------------------------------------------------------------------------------------------------------
# The call
# ---------------------------------------------------------------------------------------------------------------------

MASKS: dict[str, Tensor | None] = {
    "none": None,
    "int64": MASK,
    "bool": MASK.bool(),
    "float": MASK.float(),
    "left": MASK.flip(1),
    "holes": MASK * (torch.arange(12) != 3),
    "a row of nothing": MASK * torch.tensor([1, 0, 1, 1])[:, None],
    "nothing": torch.zeros_like(MASK).bool(),
}


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_row_is_that_of_transformers(config: T5Config, reference: nn.Module, mask: str, layout: Any) -> None:
    ids = ids_for(config)
    ours = NAIT5EncoderModel.from_hf(reference, layout=layout)
    assert_near(ours(ids, MASKS[mask])[0], reference(ids, attention_mask=MASKS[mask])[0])


def test_every_way_to_call(config: T5Config, reference: nn.Module) -> None:
    ids = ids_for(config)
    ours = NAIT5EncoderModel.from_hf(reference)
    expected = reference(ids, MASK)
    assert_near(ours(ids)[0], reference(ids)[0])
    for out in (
        ours(ids, MASK),
        ours(ids, attention_mask=MASK, output_hidden_states=False),
        ours(input_ids=ids, attention_mask=MASK, token_type_ids=torch.zeros_like(ids)),
        ours(inputs_embeds=reference.get_input_embeddings()(ids), attention_mask=MASK),  # type: ignore[operator]
        ours(None, MASK, ours.get_input_embeddings()(ids)),
    ):
        assert out[0] is out.last_hidden_state is out["last_hidden_state"]
        assert_near(out.last_hidden_state, expected.last_hidden_state)
    as_tuple = ours(ids, MASK, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    assert_near(as_tuple[0], expected[0])


def test_hidden_states_come_in_transformers_order(config: T5Config, reference: nn.Module) -> None:
    ids = ids_for(config)
    expected = reference(ids, MASK, output_hidden_states=True)
    ours = NAIT5EncoderModel.from_hf(reference)
    out = ours(ids, MASK, output_hidden_states=True)
    assert len(out.hidden_states) == config.num_layers + 1
    for state, other in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert_near(state, other)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    ours.config.output_hidden_states = True
    assert len(ours(ids, MASK, return_dict=False)[1]) == config.num_layers + 1


def test_hidden_states_have_the_dtype_of_the_model() -> None:
    """Pipelines add the first to the last."""
    ours = NAIT5EncoderModel.from_hf(hf_model(TOY_CONFIGS["v1.1"]), torch.bfloat16)
    assert {state.dtype for state in ours(V1_1_IDS, output_hidden_states=True).hidden_states} == {torch.bfloat16}
    large = NAIT5EncoderModel.from_hf(
        hf_model(TOY_CONFIGS["v1.1"], stress_state(TOY_CONFIGS["v1.1"], "feed_forward_out")), torch.float16
    )
    with pytest.warns(ScaleTightenedWarning):
        large(V1_1_IDS)
    states = large(V1_1_IDS, output_hidden_states=True).hidden_states
    assert all(state.dtype == torch.float16 and state.isfinite().all() for state in states)


def test_outputs_belong_to_the_caller(v1_1: NAIT5EncoderModel) -> None:
    """Cosmos and Kandinsky write into them."""
    for padding in ("exact", "skip", "attend"):
        v1_1.padding = padding  # type: ignore[assignment]
        with torch.no_grad():
            out = v1_1(V1_1_IDS, MASK)[0]
        assert not out.is_inference() and not out.requires_grad
        kept = out.clone()
        out[0, 3:] = 0
        assert_near(v1_1(V1_1_IDS, MASK)[0], kept)
    with torch.inference_mode():
        v1_1(V1_1_IDS, MASK)[0].zero_()
    assert_near(v1_1(V1_1_IDS, MASK)[0], kept)


def test_gradients_are_those_of_transformers() -> None:
    reference = hf_model(TOY_CONFIGS["v1.1"])
    ours = NAIT5EncoderModel.from_hf(reference, layout="separate")
    for model in (reference, ours):
        model.requires_grad_(True)
        model(V1_1_IDS, MASK)[0].square().mean().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        if model is reference:
            expected = grads
    assert grads.keys() >= {"shared.weight", "encoder.block.2.layer.1.DenseReluDense.wo.weight"}
    for name, grad in grads.items():
        assert_near(grad, expected[name], 1e-4)


def test_what_cannot_be_done_is_said(v1_1: NAIT5EncoderModel) -> None:
    with pytest.raises(ValueError, match="never formed"):
        v1_1(V1_1_IDS, output_attentions=True)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        v1_1()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        v1_1(V1_1_IDS + 96)
    with pytest.raises(ValueError, match="allowed: attend, exact, skip, trim"):
        v1_1.padding = "none"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="extra_pad=-1"):
        v1_1.extra_pad = -1


def test_padding_policy_is_set_by_hand_and_seen(v1_1: NAIT5EncoderModel) -> None:
    exact = v1_1(V1_1_IDS, MASK)[0]
    assert "T5 v1.1, fused, torch.float32, padding=exact" in repr(v1_1)
    v1_1.padding, v1_1.extra_pad = "skip", 1
    assert "padding=skip, extra_pad=1" in repr(v1_1)
    read = padding_mask([6, 12, 2, 9], 12).bool()
    out = v1_1(V1_1_IDS, MASK)[0]
    assert_near(out[read], exact[read])
    assert not out[~read].any()
    v1_1.padding, v1_1.extra_pad = "trim", 0
    assert v1_1(V1_1_IDS[:1], MASK[:1])[0].shape == (1, 5, 64)


# ---------------------------------------------------------------------------------------------------------------------
# dtype
# ---------------------------------------------------------------------------------------------------------------------


# What transformers itself makes of these in float16 is NaN. The last has a layer whose rounding alone is this large.
@pytest.mark.parametrize(("outlier", "relative"), [("hidden", 2e-2), ("embedding", 1e-3), ("attention_out", 5e-2)])
def test_float16_stays_finite_where_transformers_does_not(outlier: Any, relative: float) -> None:
    config = TOY_CONFIGS["v1.1"]
    state = stress_state(config, outlier)
    assert not hf_model(config, state, torch.float16)(V1_1_IDS, MASK)[0].isfinite().all()
    ours = NAIT5EncoderModel.from_hf(hf_model(config, state), torch.float16)
    if outlier == "embedding":  # known before the first call
        out = ours(V1_1_IDS, MASK)[0]
    else:
        with pytest.warns(ScaleTightenedWarning):
            out = ours(V1_1_IDS, MASK)[0]
    assert out.dtype == torch.float16 and ours.dtype == torch.float16
    assert_near(out.float(), hf_model(config, state)(V1_1_IDS, MASK)[0], relative)


def test_casts_of_a_loaded_model(v1_1: NAIT5EncoderModel) -> None:
    expected = v1_1(V1_1_IDS, MASK)[0]
    for dtype, relative in ((torch.float16, 1e-2), (torch.bfloat16, 1e-1), (torch.float64, 1e-5)):
        cast = copy.deepcopy(v1_1).to(dtype)
        assert cast.dtype == cast(V1_1_IDS, MASK)[0].dtype == dtype
        assert_near(cast(V1_1_IDS, MASK)[0].float(), expected, relative)
    assert v1_1.to("meta").device.type == "meta"


@pytest.mark.parametrize("release", [False, True])
def test_what_float16_cannot_hold_is_refused_before_a_weight_is_taken(release: bool) -> None:
    """That shows when a joined weight is made, and others would be gone by then."""
    model = hf_model(TOY_CONFIGS["v1.1"])
    with torch.no_grad():
        model.encoder.block[1].layer[0].SelfAttention.q.weight[0, 0] = 1e6  # type: ignore[union-attr,index]
    expected = model(V1_1_IDS, MASK)[0]
    with pytest.raises(CheckpointError, match=r"block\.1\.layer\.0\.SelfAttention\.qkv\.weight has values"):
        NAIT5EncoderModel.from_hf(model, torch.float16, release=release)
    assert torch.equal(model(V1_1_IDS, MASK)[0], expected)


@pytest.mark.parametrize("layout", ["fused", "separate"])
def test_single_projections_can_be_kept_in_float32(layout: Any) -> None:
    """A recipe that users are told: cast the encoder to bfloat16, then every wo back."""
    model = NAIT5EncoderModel.from_hf(hf_model(TOY_CONFIGS["v1.1"]), layout=layout)
    expected = model(V1_1_IDS, MASK)[0]
    model.to(torch.bfloat16)
    for block in model.encoder.block:
        block.layer[-1].DenseReluDense.wo.to(torch.float32)
    out = model(V1_1_IDS, MASK)[0]
    assert out.dtype == torch.bfloat16
    assert_near(out.float(), expected, 1e-1)


def test_damaged_weights_are_told_in_float16(v1_1: NAIT5EncoderModel) -> None:
    v1_1.half()
    with torch.no_grad():
        v1_1.encoder.block[1].layer[0].SelfAttention.o.weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"block\.1\.layer\.0\.SelfAttention\.o\.weight"):
        v1_1(V1_1_IDS)
