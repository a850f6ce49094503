"""What ComfyUI does to the weights of a CLIP holds for ours: LoRA, hooks, merging, offloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_toys import (
    FAMILY_CONFIGS,
    V1_1,
    assert_equal_conditioning,
    conditioning,
    error,
    require_comfyui,
    stock,
    toy_file,
    toy_lora,
)

from comfy_nai_t5.choices import Settings

require_comfyui()

ATTENTION, DENSE = "encoder.block.{}.layer.0.SelfAttention.{}", "encoder.block.{}.layer.1.DenseReluDense.{}"
EVERYWHERE = (
    *(ATTENTION.format(1, name) for name in "qkvo"),
    *(DENSE.format(2, name) for name in ("wi_0", "wi_1", "wo")),
    ATTENTION.format(0, "relative_attention_bias"),
    "shared",
)


def pair(folder: Path, family: str = "mochi") -> tuple[Any, Any]:
    """Ours and ComfyUI's CLIP of the same file, loaded apart."""
    from comfy_nai_t5.clip import with_our_t5

    path = toy_file(folder, FAMILY_CONFIGS[family])
    return with_our_t5(stock(path, family), Settings("float32")), stock(path, family)


def with_lora(clip: Any, lora: dict[str, torch.Tensor], strength: float) -> Any:
    import comfy.sd

    return comfy.sd.load_lora_for_models(None, clip, lora, 0, strength)[1]


def t5_of(clip: Any) -> Any:
    return clip.cond_stage_model.t5xxl.transformer


@pytest.mark.parametrize(
    "keys", [EVERYWHERE, *((key,) for key in EVERYWHERE)], ids=lambda keys: keys[-1] if keys[1:] == () else "all"
)
def test_lora(keys: tuple[str, ...], tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path)
    lora = toy_lora(t5_of(theirs), keys, "t5xxl")
    plain = conditioning(ours, "a (cat:1.2)")
    patched = [with_lora(clip, lora, 0.8) for clip in (ours, theirs)]
    mine, expected = (conditioning(clip, "a (cat:1.2)") for clip in patched)
    assert_equal_conditioning(mine, expected)
    assert error(expected["cond"], plain["cond"]) > 1e-3
    # And without it again, from the same weights.
    assert_equal_conditioning(conditioning(ours, "a (cat:1.2)"), plain, 1e-6)


def test_lora_strengths_and_several_at_once(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path)
    first = toy_lora(t5_of(theirs), EVERYWHERE[:3], "t5xxl", seed=1)
    second = toy_lora(t5_of(theirs), EVERYWHERE[2:5], "t5xxl", seed=2)
    for a, b in ((1.0, 0.5), (-0.3, 0.5), (0.0, 2.0)):
        mine, expected = (
            conditioning(with_lora(with_lora(clip, first, a), second, b), "a cat") for clip in (ours, theirs)
        )
        assert_equal_conditioning(mine, expected)


def test_lora_before_replacing(tmp_path: Path) -> None:
    from comfy_nai_t5.clip import with_our_t5

    _, theirs = pair(tmp_path)
    patched = with_lora(theirs, toy_lora(t5_of(theirs), EVERYWHERE, "t5xxl"), 1.0)
    assert_equal_conditioning(
        conditioning(with_our_t5(patched, Settings("float32")), "a cat"), conditioning(patched, "a cat")
    )


def test_lora_in_bfloat16_and_float16(tmp_path: Path) -> None:
    from comfy_nai_t5.clip import with_our_t5

    _, theirs = pair(tmp_path)
    patched = with_lora(theirs, toy_lora(t5_of(theirs), EVERYWHERE, "t5xxl"), 1.0)
    exact = conditioning(patched, "a cat")["cond"]
    for dtype, limit in (("bfloat16", 4e-2), ("float16", 4e-3)):
        assert error(conditioning(with_our_t5(patched, Settings(dtype)), "a cat")["cond"], exact) < limit


def test_a_lora_that_matches_nothing_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, _ = pair(tmp_path)
    lora = toy_lora(t5_of(ours), EVERYWHERE[:1], "t5of_another_model")
    with caplog.at_level("WARNING"):
        patched = with_lora(ours, lora, 1.0)
    assert_equal_conditioning(conditioning(patched, "a cat"), conditioning(ours, "a cat"), 1e-9)
    assert "lora key not loaded" in caplog.text


@pytest.mark.parametrize("scheduled", [False, True])
def test_hooks(scheduled: bool, tmp_path: Path) -> None:
    """A LoRA as a hook whose strength changes over the steps: several conditionings of one prompt."""
    import comfy.hooks
    import nodes
    from comfy_extras.nodes_hooks import SetClipHooks

    ours, theirs = pair(tmp_path)
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


def test_merging(tmp_path: Path) -> None:
    from comfy_extras.nodes_model_merging import CLIPMergeSimple

    from comfy_nai_t5.clip import with_our_t5

    first, second = (stock(toy_file(tmp_path, V1_1, seed), "mochi") for seed in (0, 1))
    expected = conditioning(CLIPMergeSimple().merge(first, second, 0.4)[0], "a cat")
    both = [with_our_t5(clip, Settings("float32")) for clip in (first, second)]
    assert_equal_conditioning(conditioning(CLIPMergeSimple().merge(*both, 0.4)[0], "a cat"), expected)
    assert error(expected["cond"], conditioning(first, "a cat")["cond"]) > 1e-3


@pytest.mark.parametrize("family", ["mochi", "cosmos"])
def test_weights_patched_at_every_call(family: str, tmp_path: Path) -> None:
    """What does not fit on the device stays unpatched in memory, and is cast and patched when it is used."""
    from comfy.model_patcher import LowVramPatch

    ours, theirs = pair(tmp_path, family)
    keys = tuple(ATTENTION.format(layer, name) for layer in range(3) for name in "qo")
    lora = toy_lora(t5_of(theirs), (*keys, EVERYWHERE[-2]), "t5xxl")
    expected = conditioning(with_lora(theirs, lora, 1.0), "a cat")["cond"]
    patches = with_lora(ours, lora, 1.0).patcher.patches
    assert len(patches) == len(keys) + 1
    for key in patches:
        module = ours.patcher.model.get_submodule(key.removesuffix(".weight"))
        module.weight_function = [LowVramPatch(key, patches)]
    with torch.inference_mode():
        states = ours.cond_stage_model.encode_token_weights(ours.tokenize("a cat"))[0]
    assert error(states, expected) < 1e-4


def test_unloading_and_loading_again(tmp_path: Path) -> None:
    import comfy.model_management

    ours, _ = pair(tmp_path)
    patched = with_lora(ours, toy_lora(t5_of(ours), EVERYWHERE, "t5xxl"), 1.0)
    before = conditioning(patched, "a cat"), conditioning(ours, "a cat")
    comfy.model_management.unload_all_models()
    assert_equal_conditioning(conditioning(patched, "a cat"), before[0], 1e-6)
    comfy.model_management.unload_all_models()
    assert_equal_conditioning(conditioning(ours, "a cat"), before[1], 1e-6)
