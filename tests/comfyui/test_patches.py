"""What ComfyUI does to the weights of a CLIP holds for ours: LoRA, hooks, merging, offloading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_file
from comfy_toys import (
    FAMILY_CONFIGS,
    FUSED,
    NEAR_IN_8_BITS,
    V1_1,
    assert_equal_conditioning,
    conditioning,
    error,
    needs_8_bits,
    require_comfyui,
    stock,
    toy_file,
    toy_lora,
    toy_state,
)

from comfy_nai_t5.choices import Settings
from nai_t5_core.backends.products import ONEDNN
from nai_t5_core.facts.scales import LayerScales, StackScales

require_comfyui()

ATTENTION, DENSE = "encoder.block.{}.layer.0.SelfAttention.{}", "encoder.block.{}.layer.1.DenseReluDense.{}"
EVERYWHERE = (
    *(ATTENTION.format(1, name) for name in "qkvo"),
    *(DENSE.format(2, name) for name in ("wi_0", "wi_1", "wo")),
    ATTENTION.format(0, "relative_attention_bias"),
    "shared",
)


@pytest.fixture(params=["fused", "packed", "separate", pytest.param("int8", marks=needs_8_bits)])
def settings(request: pytest.FixtureRequest) -> Settings:
    """All layouts, where "fused" makes it an error if a layer is not."""
    return Settings("float32", layout=request.param)


def pair(folder: Path, settings: Settings, family: str = "mochi") -> tuple[Any, Any]:
    """Ours and ComfyUI's CLIP of the same file, loaded apart."""
    from comfy_nai_t5.clip import with_our_t5

    path = toy_file(folder, FAMILY_CONFIGS[family])
    return with_our_t5(stock(path, family), settings), stock(path, family)


def reference(theirs: Any, settings: Settings, text: str = "a cat") -> dict[str, Any]:
    """What stock makes; for 8 bits, what is near it, by one in 8 bits that is made of its weights."""
    from comfy_nai_t5.clip import with_our_t5

    exact = conditioning(theirs, text)
    if settings.layout != "int8":
        return exact
    anew = conditioning(with_our_t5(theirs, settings), text)
    assert error(anew["cond"], exact["cond"]) < NEAR_IN_8_BITS
    return anew


def with_lora(clip: Any, lora: dict[str, torch.Tensor], strength: float) -> Any:
    import comfy.sd

    return comfy.sd.load_lora_for_models(None, clip, lora, 0, strength)[1]


def t5_of(clip: Any) -> Any:
    return clip.cond_stage_model.t5xxl.transformer


@pytest.mark.parametrize(
    "keys", [EVERYWHERE, *((key,) for key in EVERYWHERE)], ids=lambda keys: keys[-1] if keys[1:] == () else "all"
)
def test_lora(keys: tuple[str, ...], tmp_path: Path, settings: Settings) -> None:
    ours, theirs = pair(tmp_path, settings)
    lora = toy_lora(t5_of(theirs), keys, "t5xxl")
    plain = conditioning(ours, "a (cat:1.2)")
    mine = conditioning(with_lora(ours, lora, 0.8), "a (cat:1.2)")
    expected = reference(with_lora(theirs, lora, 0.8), settings, "a (cat:1.2)")
    assert_equal_conditioning(mine, expected)
    assert error(expected["cond"], plain["cond"]) > 1e-3
    # And without it again, from the same weights.
    assert_equal_conditioning(conditioning(ours, "a (cat:1.2)"), plain, 1e-6)


def test_lora_strengths_and_several_at_once(tmp_path: Path, settings: Settings) -> None:
    ours, theirs = pair(tmp_path, settings)
    first = toy_lora(t5_of(theirs), EVERYWHERE[:3], "t5xxl", seed=1)
    second = toy_lora(t5_of(theirs), EVERYWHERE[2:5], "t5xxl", seed=2)
    for a, b in ((1.0, 0.5), (-0.3, 0.5), (0.0, 2.0)):
        mine, stock_one = (with_lora(with_lora(clip, first, a), second, b) for clip in (ours, theirs))
        expected = reference(stock_one, settings)
        mine = conditioning(mine, "a cat")
        assert_equal_conditioning(mine, expected)


def test_lora_before_replacing(tmp_path: Path, settings: Settings) -> None:
    from comfy_nai_t5.clip import with_our_t5

    _, theirs = pair(tmp_path, settings)
    patched = with_lora(theirs, toy_lora(t5_of(theirs), EVERYWHERE, "t5xxl"), 1.0)
    assert_equal_conditioning(conditioning(with_our_t5(patched, settings), "a cat"), reference(patched, settings))


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 4e-2), ("float16", 4e-3)])
def test_lora_in_bfloat16_and_float16(dtype: str, limit: float, tmp_path: Path, settings: Settings) -> None:
    from comfy_nai_t5.clip import with_our_t5

    if settings.layout in ("packed", "int8") and ONEDNN.missing(torch.device("cpu"), getattr(torch, dtype)):
        pytest.skip(f"{dtype} is not kept in another form here")
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in toy_state(V1_1).items()}
    theirs = stock(write_file(tmp_path / "half.safetensors", weights), "mochi")
    patched = with_lora(theirs, toy_lora(t5_of(theirs), EVERYWHERE, "t5xxl"), 1.0)
    ours = with_our_t5(patched, replace(settings, dtype=dtype))
    limit = NEAR_IN_8_BITS if settings.layout == "int8" else limit
    assert error(conditioning(ours, "a cat")["cond"], conditioning(patched, "a cat")["cond"]) < limit


@pytest.mark.parametrize("key", [ATTENTION.format(0, "k"), DENSE.format(0, "wi_1"), DENSE.format(1, "wo")])
def test_lora_with_float16_scales(key: str, tmp_path: Path, settings: Settings) -> None:
    """The scales act on activations, so a patch is the same with them: compared in float32, where both can be had."""
    from comfy_nai_t5.clip import EncoderModel
    from comfy_nai_t5.stack import SharedStack

    ours, theirs = pair(tmp_path, settings)
    scales = StackScales(tuple(LayerScales(2.0**-2, 2.0**-3, 2.0**-4) for _ in range(V1_1.num_layers)))
    owner = ours.cond_stage_model.t5xxl
    owner.transformer = EncoderModel(
        owner.transformer, SharedStack(owner.transformer, torch.float32, scales, wish=settings.layout)
    )
    lora = toy_lora(t5_of(theirs), (key,), "t5xxl")
    mine = conditioning(with_lora(ours, lora, 0.8), "a cat")
    expected = reference(with_lora(theirs, lora, 0.8), settings)
    assert_equal_conditioning(mine, expected, 1e-2 if settings.layout == "int8" else 1e-4)


def test_norms_and_weights_that_are_replaced(tmp_path: Path, settings: Settings) -> None:
    """What a delta on a joined tensor could not express: the norm's own weight, and one set to another value."""
    ours, theirs = pair(tmp_path, settings)
    q, norm = (f"t5xxl.transformer.encoder.block.1.layer.0.{name}.weight" for name in ("SelfAttention.q", "layer_norm"))
    patches = {q: ("set", (torch.randn(64, 64) / 8,)), norm: ("diff", (torch.rand(64),))}
    clones = [clip.clone() for clip in (ours, theirs)]
    for clone in clones:
        assert set(clone.add_patches(patches, 0.7)) == set(patches)
    mine, expected = conditioning(clones[0], "a cat"), reference(clones[1], settings)
    assert_equal_conditioning(mine, expected)
    assert error(expected["cond"], conditioning(theirs, "a cat")["cond"]) > 1e-3


def test_dora(tmp_path: Path, settings: Settings) -> None:
    """Its magnitude is of the rows of q alone."""
    ours, theirs = pair(tmp_path, settings)
    key = ATTENTION.format(1, "q")
    lora = toy_lora(t5_of(theirs), (key,), "t5xxl")
    lora[f"text_encoders.t5xxl.transformer.{key}.dora_scale"] = torch.rand(64, 1) + 0.5
    mine = conditioning(with_lora(ours, lora, 0.8), "a cat")
    assert_equal_conditioning(mine, reference(with_lora(theirs, lora, 0.8), settings))


def test_clones_with_other_strengths_take_turns(tmp_path: Path, settings: Settings) -> None:
    ours, theirs = pair(tmp_path, settings)
    lora = toy_lora(t5_of(theirs), EVERYWHERE, "t5xxl")
    clones = {strength: [with_lora(clip, lora, strength) for clip in (ours, theirs)] for strength in (0.2, 1.0, -0.5)}
    for strength in (0.2, 1.0, 0.2, -0.5, 1.0):
        mine, stock_one = clones[strength]
        assert_equal_conditioning(conditioning(mine, "a cat"), reference(stock_one, settings))


def test_a_lora_that_matches_nothing_changes_nothing_and_says_so(
    tmp_path: Path, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    ours, _ = pair(tmp_path, settings)
    with caplog.at_level("WARNING"):
        patched = with_lora(ours, toy_lora(t5_of(ours), EVERYWHERE[:1], "t5of_another_model"), 1.0)
    # Rounding, since the packed layout packs between the two.
    assert_equal_conditioning(conditioning(patched, "a cat"), conditioning(ours, "a cat"), 1e-6)
    assert "This LoRA changes nothing: none of its keys belongs to" in caplog.text and "(t5xxl)" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        with_lora(ours, toy_lora(t5_of(ours), EVERYWHERE[:1], "t5xxl"), 1.0)
        ours.add_patches({"diffusion_model.x.weight": ("diff", (torch.zeros(1),))})  # LoRAs for the model alone
    assert "changes nothing" not in caplog.text


@pytest.mark.parametrize("scheduled", [False, True])
def test_hooks(scheduled: bool, tmp_path: Path, settings: Settings) -> None:
    """A LoRA as a hook whose strength changes over the steps: several conditionings of one prompt."""
    import comfy.hooks
    import nodes
    from comfy_extras.nodes_hooks import SetClipHooks

    ours, theirs = pair(tmp_path, settings)
    lora = toy_lora(t5_of(theirs), EVERYWHERE, "t5xxl")
    results = []
    for clip in (ours, theirs):
        hooks = comfy.hooks.create_hook_lora(lora, 0, 1.0)
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
        frames.add(comfy.hooks.HookKeyframe(strength=0.3, start_percent=0.5))
        hooks.set_keyframes_on_hooks(frames)
        hooked = SetClipHooks().apply_hooks(clip, schedule_clip=scheduled, apply_to_conds=True, hooks=hooks)[0]
        with torch.inference_mode():
            results.append(nodes.CLIPTextEncode().encode(hooked, "a cat")[0])
    mine, expected = results
    assert len(mine) == len(expected) == (2 if scheduled else 1)
    for ours_at, theirs_at in zip(mine, expected, strict=True):
        assert error(ours_at[0], theirs_at[0]) < 1e-4
    if scheduled:
        assert error(expected[0][0], expected[1][0]) > 1e-3


def warnings_of_a_hook(clip: Any, lora: dict[str, torch.Tensor], strength: float, caplog: Any) -> list[str]:
    """What is told when the hook of a LoRA is set on a CLIP, as its node sets it."""
    import comfy.hooks
    from comfy_extras.nodes_hooks import SetClipHooks

    caplog.clear()
    with caplog.at_level("WARNING"):
        hooks = comfy.hooks.create_hook_lora(lora, 1.0, strength)
        SetClipHooks().apply_hooks(clip, schedule_clip=True, apply_to_conds=True, hooks=hooks)
    return [record.getMessage() for record in caplog.records if "T5 (NAI)" in record.getMessage()]


def test_a_hook_that_matches_nothing_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from comfy_nai_t5.clip import with_our_t5

    ours, _ = pair(tmp_path, Settings("float32"))
    other = toy_lora(t5_of(ours), EVERYWHERE[:1], "t5_of_another_model")
    (warning,) = warnings_of_a_hook(ours, other, 1.0, caplog)
    assert "The LoRA of a hook changes nothing in the text encoders" in warning and "(t5xxl)" in warning
    assert len(warnings_of_a_hook(with_our_t5(ours).clone(), other, -0.5, caplog)) == 1  # once, replaced twice or not
    for lora, strength in (
        (other, 0.0),
        (toy_lora(t5_of(ours), EVERYWHERE[:1], "t5xxl"), 1.0),
        ({**other, **toy_lora(t5_of(ours), EVERYWHERE[:1], "t5xxl")}, 1.0),
        ({"lora_unet_x.lora_up.weight": torch.zeros(1, 1)}, 1.0),  # for the model alone
    ):
        assert warnings_of_a_hook(ours, lora, strength, caplog) == []


@pytest.mark.parametrize("family", ["mochi", "wan"])
def test_all_names_that_a_text_encoder_has_in_loras_are_known(family: str, tmp_path: Path) -> None:
    import comfy.lora

    from comfy_nai_t5.idle_hooks import _FOR_TEXT

    ours, _ = pair(tmp_path, Settings("float32"), family)
    names = comfy.lora.model_lora_keys_clip(ours.cond_stage_model, {})
    assert len(names) > 20 and all(map(_FOR_TEXT.match, names))
    assert not any(map(_FOR_TEXT.match, ("lora_unet_te_blocks_0", "diffusion_model.text_encoder.x", "transformer.x")))


def test_merging(tmp_path: Path, settings: Settings) -> None:
    from comfy_extras.nodes_model_merging import CLIPMergeSimple

    from comfy_nai_t5.clip import with_our_t5

    first, second = (stock(toy_file(tmp_path, V1_1, seed), "mochi") for seed in (0, 1))
    expected = reference(CLIPMergeSimple().merge(first, second, 0.4)[0], settings)
    both = [with_our_t5(clip, settings) for clip in (first, second)]
    assert_equal_conditioning(conditioning(CLIPMergeSimple().merge(*both, 0.4)[0], "a cat"), expected)
    assert error(expected["cond"], conditioning(first, "a cat")["cond"]) > 1e-3


@pytest.mark.parametrize("family", ["mochi", "cosmos"])
def test_partial_loading(family: str, tmp_path: Path) -> None:
    """What does not fit on the device stays unpatched in memory, and is patched when it is used."""
    from comfy.model_patcher import LowVramPatch, wipe_lowvram_weight

    ours, theirs = pair(tmp_path, Settings("float32"), family)
    keys = tuple(ATTENTION.format(layer, name) for layer in range(3) for name in "qo")
    lora = toy_lora(t5_of(theirs), (*keys, EVERYWHERE[-2]), "t5xxl")
    expected = conditioning(with_lora(theirs, lora, 1.0), "a cat")["cond"]
    patched = with_lora(ours, lora, 1.0)
    for module in patched.patcher.model.modules():
        wipe_lowvram_weight(module)  # on a CPU, ComfyUI has loaded everything already; with a GPU, nothing
    patched.patcher.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    late = [
        module
        for module in patched.patcher.model.modules()
        if any(isinstance(function, LowVramPatch) for function in getattr(module, "weight_function", ()))
    ]
    assert len(late) == len(keys) + 1 and patched.patcher.model.model_lowvram
    with torch.inference_mode():
        states = patched.cond_stage_model.encode_token_weights(patched.tokenize("a cat"))[0]
    assert error(states, expected) < 1e-4
    assert "its weights are patched at every call" in t5_of(ours).stack.told
    patched.patcher.detach()
    assert_equal_conditioning(conditioning(ours, "a cat"), conditioning(theirs, "a cat"))
    assert t5_of(ours).stack.told == FUSED


def test_unloading_and_loading_again(tmp_path: Path, settings: Settings) -> None:
    import comfy.model_management

    ours, _ = pair(tmp_path, settings)
    patched = with_lora(ours, toy_lora(t5_of(ours), EVERYWHERE, "t5xxl"), 1.0)
    before = conditioning(patched, "a cat"), conditioning(ours, "a cat")
    comfy.model_management.unload_all_models()
    assert_equal_conditioning(conditioning(patched, "a cat"), before[0], 1e-6)
    comfy.model_management.unload_all_models()
    assert_equal_conditioning(conditioning(ours, "a cat"), before[1], 1e-6)
