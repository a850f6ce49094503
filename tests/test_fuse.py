"""Fusing: every original goes in once, comes out again, and is rounded once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import TOY_CONFIGS, random_state
from torch import Tensor

from nai_t5_core.facts.config import T5Config, decoder_tensors, encoder_tensors
from nai_t5_core.weights.fuse import Recipe, cook, fused_recipes, separate_recipes, uncook_part, unfuse


def cooked(config: T5Config, state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {recipe.target: cook(recipe, state.__getitem__, dtype) for recipe in fused_recipes(config)}


def in_float64(recipe: Recipe, state: dict[str, Tensor]) -> Tensor:
    """The fused tensor as the mathematics has it: products of float32 numbers are exact in float64."""
    stacked = torch.cat([state[name].double() for name in recipe.parts])
    return stacked if recipe.norm is None else stacked * state[recipe.norm].double()


@pytest.mark.parametrize("encoder_only", [False, True])
def test_every_original_goes_in_once(config: T5Config, encoder_only: bool) -> None:
    config = config.encoder_only() if encoder_only else config
    originals = encoder_tensors(config) | decoder_tensors(config)
    for recipes in (fused_recipes(config), separate_recipes(config)):
        assert Counter(part for recipe in recipes for part in recipe.parts) == Counter(list(originals))
        assert len({recipe.target for recipe in recipes}) == len(recipes)


def test_every_norm_but_the_final_ones_is_folded_into_what_follows(config: T5Config) -> None:
    """Three per decoder layer, two per encoder layer, each into the projections that read it."""
    folded = Counter(recipe.norm for recipe in fused_recipes(config) if recipe.norm)
    norms = [name for name in encoder_tensors(config) | decoder_tensors(config) if "layer_norm" in name]
    assert folded == Counter(name for name in norms if "final" not in name)
    for recipe in fused_recipes(config):
        if recipe.norm:
            assert recipe.norm.rpartition(".layer_norm")[0] == recipe.target.rsplit(".", 3)[0]


def test_targets() -> None:
    """The names that the fused layout has, on one layer of each stack."""
    targets = {recipe.target: recipe for recipe in fused_recipes(TOY_CONFIGS["v1.1"])}
    assert targets["encoder.block.1.layer.0.SelfAttention.qkv.weight"].shape == (3 * 64, 64)
    assert targets["encoder.block.1.layer.1.DenseReluDense.wi.weight"].shape == (2 * 80, 64)
    assert targets["decoder.block.1.layer.1.EncDecAttention.kv.weight"].norm is None
    assert (
        targets["decoder.block.1.layer.1.EncDecAttention.q.weight"].norm == "decoder.block.1.layer.1.layer_norm.weight"
    )
    assert (
        "encoder.final_layer_norm.weight" in targets and "encoder.block.1.layer.0.layer_norm.folded_weight" in targets
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_is_the_exact_product_rounded_once(config: T5Config, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in random_state(config).items()}
    for recipe in fused_recipes(config):
        tensor = cook(recipe, state.__getitem__, dtype)
        expected_dtype = torch.float32 if "layer_norm" in recipe.target else dtype
        assert torch.equal(tensor, in_float64(recipe, state).to(expected_dtype)), recipe.target
        assert (tensor.dtype, tuple(tensor.shape)) == (expected_dtype, recipe.shape)


def test_cast_while_fusing(config: T5Config) -> None:
    """float32 to bfloat16 goes through the float32 product: never more than one unit in the last place off."""
    state = random_state(config)
    for recipe in fused_recipes(config):
        tensor = cook(recipe, state.__getitem__, torch.bfloat16)
        torch.testing.assert_close(tensor.double(), in_float64(recipe, state), rtol=2**-8, atol=0)


def test_unfuse_gives_the_originals_back(config: T5Config) -> None:
    state = random_state(config)
    back = dict(unfuse(config, cooked(config, state, torch.float32).__getitem__))
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        # One multiplication and one division, each with half a unit of rounding.
        torch.testing.assert_close(back[name], tensor, rtol=2**-23, atol=0, msg=name)
        if not name.endswith((".q.weight", ".k.weight", ".v.weight", "wi.weight", "wi_0.weight", "wi_1.weight")):
            assert torch.equal(back[name], tensor), name


def test_float64_is_fused_and_unfused_in_float64(config: T5Config) -> None:
    state = {name: tensor.double() for name, tensor in random_state(config).items()}
    fused = cooked(config, state, torch.float64)
    for recipe in fused_recipes(config):
        assert torch.equal(fused[recipe.target].double(), in_float64(recipe, state)), recipe.target
    for name, tensor in unfuse(config, fused.__getitem__):
        torch.testing.assert_close(tensor.double(), state[name], rtol=2**-52, atol=0, msg=name)


def test_a_norm_weight_of_zero_leaves_zeros_and_no_nan() -> None:
    config = TOY_CONFIGS["v1.1"]
    state = random_state(config)
    norm = "encoder.block.0.layer.0.layer_norm.weight"
    state[norm][5] = 0
    back = dict(unfuse(config, cooked(config, state, torch.float32).__getitem__))
    query = back["encoder.block.0.layer.0.SelfAttention.q.weight"]
    assert not query[:, 5].any() and torch.isfinite(query).all()
    assert torch.equal(back[norm], state[norm])


def test_nothing_is_copied_where_nothing_changes() -> None:
    """So that a mapped file stays the weights' only memory."""
    config = TOY_CONFIGS["v1.1"]
    state = random_state(config)
    for recipe in separate_recipes(config):
        assert cook(recipe, state.__getitem__, torch.float32).data_ptr() == state[recipe.target].data_ptr()


def test_one_original_is_taken_out_without_the_work_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TOY_CONFIGS["v1.1"].encoder_only()
    state, shapes = random_state(config), encoder_tensors(config)
    fused = cooked(config, state, torch.float32)
    recipe = next(each for each in fused_recipes(config) if len(each.parts) == 3)
    divided: list[int] = []
    where = torch.where

    def counted(condition: Tensor, zero: float, quotients: Tensor) -> Tensor:
        divided.append(len(quotients))
        return where(condition, zero, quotients)

    monkeypatch.setattr(torch, "where", counted)
    read = {**fused, **{name.replace("layer_norm.weight", "layer_norm.folded_weight"): state[name] for name in state}}
    for name in recipe.parts:
        found = uncook_part(recipe, name, read.__getitem__, shapes)
        torch.testing.assert_close(found, state[name], rtol=1e-6, atol=1e-7)
    assert divided == [shapes[name][0] for name in recipe.parts]
