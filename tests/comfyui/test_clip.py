"""Our T5 in ComfyUI's CLIP against ComfyUI's own, through its stock nodes."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import embedded_taken_apart
from comfy_toys import (
    FAMILY_CONFIGS,
    FUSED,
    UMT5,
    V1_1,
    assert_equal_conditioning,
    conditioning,
    error,
    knows,
    require_comfyui,
    stock,
    toy_family,
    toy_file,
    toy_state,
)

from comfy_nai_t5.choices import Settings

require_comfyui()

PROMPTS = [
    "a photo of a cat",
    "a (photo:1.3) of ((a cat)) on a [sofa], (blurry:0.4)",
    "",
    "line\nbreaks, Ünïcode, 猫 and   spaces",
    "a very long prompt " * 150,
]


@pytest.fixture(params=FAMILY_CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    if not knows(request.param):
        pytest.skip(f"this ComfyUI is older than {request.param}")
    return str(request.param)


def test_every_family_gives_what_stock_gives(family: str, tmp_path: Path) -> None:
    from comfy_nai_t5.clip import with_our_t5

    theirs = stock(toy_file(tmp_path, FAMILY_CONFIGS[family]), family)
    ours = with_our_t5(theirs, Settings("float32"))
    for prompt in PROMPTS:
        assert_equal_conditioning(conditioning(ours, prompt), conditioning(theirs, prompt))


def test_the_plain_family_gives_what_the_library_gives(tmp_path: Path) -> None:
    from comfy_nai_t5.loaders import load_t5
    from nai_t5_core import TextEncoder

    clip = load_t5(None, settings=Settings("float32"))
    expected = (
        TextEncoder.from_pretrained(embedded_taken_apart(tmp_path), dtype="float32")
        .encode(["a photo of a cat"])
        .hidden_states
    )
    assert error(conditioning(clip, "a photo of a cat")["cond"], expected) < 1e-5


@pytest.mark.parametrize("layer", [-1, -2, -3, 0, 1])
def test_clip_skip(layer: int, tmp_path: Path) -> None:
    import nodes

    from comfy_nai_t5.clip import with_our_t5

    theirs = stock(toy_file(tmp_path, V1_1), "ltxv")
    pair = [
        nodes.CLIPSetLastLayer().set_last_layer(clip, layer)[0]
        for clip in (with_our_t5(theirs, Settings("float32")), theirs)
    ]
    ours, expected = (conditioning(clip, "a cat") for clip in pair)
    assert_equal_conditioning(ours, expected)
    if layer in (-2, 0):
        assert error(expected["cond"], conditioning(theirs, "a cat")["cond"]) > 0.01


def test_textual_inversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths
    from checkpoints import write_file

    from comfy_nai_t5.clip import with_our_t5

    write_file(tmp_path / "style.safetensors", {"t5xxl": torch.randn(3, 64)})
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [str(tmp_path)])
    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    ours = with_our_t5(theirs, Settings("float32"))
    with_style = conditioning(ours, "a cat embedding:style (embedding:style:1.2) dog")
    assert_equal_conditioning(with_style, conditioning(theirs, "a cat embedding:style (embedding:style:1.2) dog"))
    assert error(with_style["cond"], conditioning(ours, "a cat dog")["cond"]) > 0.01


def test_tokenizer_options(tmp_path: Path) -> None:
    from comfy_nai_t5.clip import with_our_t5

    theirs = stock(toy_file(tmp_path, V1_1), "ltxv")
    ours = with_our_t5(theirs, Settings("float32"))
    for clip in (theirs, ours):
        clip.set_tokenizer_option("t5xxl_min_length", 20)
        clip.set_tokenizer_option("t5xxl_min_padding", 3)
    assert conditioning(ours, "a cat")["cond"].shape[1] == 20
    assert_equal_conditioning(conditioning(ours, "a cat"), conditioning(theirs, "a cat"))


def test_replacing_twice_and_stock_untouched(tmp_path: Path) -> None:
    from comfy.text_encoders.t5 import T5

    from comfy_nai_t5.clip import EncoderModel, with_our_t5

    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    before = conditioning(theirs, "a cat")
    first = with_our_t5(theirs, Settings("bfloat16"))
    again = with_our_t5(first, Settings("float32"))
    assert_equal_conditioning(conditioning(again, "a cat"), before)
    assert isinstance(theirs.cond_stage_model.t5xxl.transformer, T5)
    assert isinstance(again.cond_stage_model.t5xxl.transformer, EncoderModel)
    conditioning(first, "something else")
    after = conditioning(theirs, "a cat")
    assert torch.equal(after["cond"], before["cond"])


def test_nothing_is_in_memory_twice(tmp_path: Path) -> None:
    from comfy_nai_t5.clip import with_our_t5

    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    ours = with_our_t5(theirs, Settings("float32"))
    storages = {p.data_ptr() for p in theirs.cond_stage_model.parameters()}
    assert {p.data_ptr() for p in ours.cond_stage_model.parameters()} == storages
    assert ours.patcher.model_size() == theirs.patcher.model_size()
    assert ours.patcher.is_clone(theirs.patcher)
    assert ours.cond_stage_model.state_dict().keys() == theirs.cond_stage_model.state_dict().keys()


def test_stock_is_what_it_was_before_during_and_after_ours(tmp_path: Path) -> None:
    """Two threads load at once, one of them ours; what stock gives is the same to the bit whenever it was loaded."""
    from comfy.text_encoders.t5 import T5

    from comfy_nai_t5.clip import EncoderModel, with_our_t5

    path = toy_file(tmp_path, V1_1)
    before = conditioning(stock(path, "mochi"), "a cat")
    during: dict[bool, list[Any]] = {True: [], False: []}

    def load(ours: bool) -> None:
        for _ in range(4):
            clip = stock(path, "mochi")
            during[ours].append(with_our_t5(clip, Settings("float32")) if ours else clip)

    threads = [threading.Thread(target=load, args=(ours,)) for ours in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for clip in during[True]:
        assert isinstance(clip.cond_stage_model.t5xxl.transformer, EncoderModel)
        assert_equal_conditioning(conditioning(clip, "a cat"), before)
    for clip in (*during[False], stock(path, "mochi")):
        assert type(clip.cond_stage_model.t5xxl.transformer) is T5
        assert torch.equal(conditioning(clip, "a cat")["cond"], before["cond"])
    assert len(during[True]) == len(during[False]) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Beside CLIP
# ---------------------------------------------------------------------------------------------------------------------


_TOY_CLIP = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "projection_dim": 64}
_TOY_CLIP |= {"num_hidden_layers": 3}
_TOY_BERT = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


def toy_clip_l(folder: Path) -> Path:
    """A file of a CLIP-L with random weights."""
    import comfy.clip_model
    import comfy.ops
    from checkpoints import write_file

    config = {**_TOY_CLIP, "hidden_act": "quick_gelu", "max_position_embeddings": 77, "vocab_size": 49408}
    model = comfy.clip_model.CLIPTextModel(
        config | {"eos_token_id": 49407}, torch.float32, "cpu", comfy.ops.manual_cast
    )
    return write_file(folder / "clip_l.safetensors", random_weights(model))


def random_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator) * (value.shape[-1] if value.ndim else 1) ** -0.5
        for name, value in model.state_dict().items()
    }


def test_flux(tmp_path: Path) -> None:
    import comfy.sd
    import comfy.utils
    from comfy_extras.nodes_flux import CLIPTextEncodeFlux

    from comfy_nai_t5.families import server_config
    from comfy_nai_t5.loaders import load_with_clip

    paths = [toy_clip_l(tmp_path), toy_file(tmp_path, V1_1)]
    ours = load_with_clip(paths, "flux", Settings("float32", "file"), model_options={"model_config": dict(_TOY_CLIP)})
    theirs = comfy.sd.load_text_encoder_state_dicts(
        [comfy.utils.load_torch_file(str(path)) for path in paths],
        clip_type=comfy.sd.CLIPType.FLUX,
        model_options={"model_config": dict(_TOY_CLIP), "t5xxl_model_config": server_config(V1_1)},
    )
    for prompt in PROMPTS:
        assert_equal_conditioning(conditioning(ours, prompt), conditioning(theirs, prompt))
    (mine,), (expected,) = (
        CLIPTextEncodeFlux.execute(clip, "a cat", "(long:1.2) text", 3.5)[0] for clip in (ours, theirs)
    )
    assert_equal_conditioning({"cond": mine[0], **mine[1]}, {"cond": expected[0], **expected[1]})


def random_clip(model: Any, tokenizer: Any, sizes: dict[str, Any], tokenizer_data: dict[str, Any] | None = None) -> Any:
    """ComfyUI's CLIP of these classes with random weights."""
    import comfy.sd

    target = type("Target", (), {"params": {}, "clip": model, "tokenizer": tokenizer})
    options = {f"{name}_model_config": config for name, config in sizes.items()} | {"dtype": torch.float32}
    clip = comfy.sd.CLIP(target, model_options=options, tokenizer_data=tokenizer_data or {})
    clip.cond_stage_model.load_state_dict(random_weights(clip.cond_stage_model))
    return clip


@pytest.mark.parametrize("parts", ["lgt", "lt", "gt", "t"])
def test_sd3(parts: str) -> None:
    import comfy.text_encoders.sd3_clip as sd3

    from comfy_nai_t5.clip import with_our_t5
    from comfy_nai_t5.families import server_config

    # ComfyUI joins CLIP's rows, padded to 4096 numbers, to those of the T5; so this one is as wide.
    t5 = server_config(V1_1.model_copy(update={"d_model": 4096, "num_layers": 2}))
    sizes = {"clip_l": _TOY_CLIP, "clip_g": _TOY_CLIP, "t5xxl": t5}
    model = sd3.sd3_clip(clip_l="l" in parts, clip_g="g" in parts, t5=True, dtype_t5=torch.float32)
    theirs = random_clip(model, sd3.SD3Tokenizer, sizes)
    ours = with_our_t5(theirs, Settings("float32"))
    for prompt in PROMPTS[:3]:
        assert_equal_conditioning(conditioning(ours, prompt), conditioning(theirs, prompt))
    if "l" in parts:
        assert ours.cond_stage_model.clip_l is theirs.cond_stage_model.clip_l


def test_hunyuan_dit() -> None:
    from checkpoints import spiece_tensor
    from comfy.text_encoders.hydit import HyditModel, HyditTokenizer

    from comfy_nai_t5.clip import with_our_t5
    from comfy_nai_t5.families import server_config

    mt5 = server_config(UMT5.model_copy(update={"bias_per_layer": False}))
    sizes = {"hydit_clip": _TOY_BERT, "mt5xl": mt5}
    theirs = random_clip(HyditModel, HyditTokenizer, sizes, {"mt5xl.spiece_model": spiece_tensor()})
    ours = with_our_t5(theirs, Settings("float32"))
    for prompt in PROMPTS[:3]:
        assert_equal_conditioning(conditioning(ours, prompt), conditioning(theirs, prompt))


TOY_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


def hidream_tokens(clip_parts: str) -> dict[str, Any]:
    """Tokens as HiDream's tokenizer gives them, but for small numbers in the place of Llama's."""
    from comfy.sd1_clip import SDTokenizer
    from comfy.text_encoders.sd3_clip import T5XXLTokenizer

    text = "a photo of a (cat:1.3)"
    words = SDTokenizer().tokenize_with_weights(text)
    return {
        "l": words if "l" in clip_parts else [],
        "g": words if "g" in clip_parts else [],
        "t5xxl": [T5XXLTokenizer(min_length=128, max_length=128).tokenize_with_weights(text)[0]],
        "llama": [[(token, 1.0) for token in (128, 7, 9, 11)]],
    }


@pytest.mark.parametrize("parts", ["lgt", "lgtm", "tm", "t"])
def test_hidream(parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its encoders (m: Llama) but its tokenizer, for which a checkout may lack a file."""
    import comfy.sd
    from comfy.text_encoders.hidream import hidream_clip

    from comfy_nai_t5.clip import t5_models, with_our_t5
    from comfy_nai_t5.families import server_config

    t5 = server_config(V1_1.model_copy(update={"num_layers": 2}))
    sizes = {"clip_l": _TOY_CLIP, "clip_g": _TOY_CLIP, "t5xxl": t5, "llama": TOY_LLAMA}
    options = {f"{name}_model_config": config for name, config in sizes.items()} | {"vocab_size": 256}
    model = hidream_clip(clip_l="l" in parts, clip_g="g" in parts, t5=True, llama="m" in parts, dtype_t5=torch.float32)
    target = type("Target", (), {"params": {}, "clip": model, "tokenizer": lambda **_: None})
    theirs = comfy.sd.CLIP(target, model_options={**options, "dtype": torch.float32})
    theirs.cond_stage_model.load_state_dict(random_weights(theirs.cond_stage_model))
    ours = with_our_t5(theirs, Settings("float32"))
    assert list(t5_models(ours.cond_stage_model)) == ["t5xxl"]
    tokens = hidream_tokens(parts)
    with torch.inference_mode():
        ((mine, extras),), ((expected, wanted),) = (
            clip.encode_from_tokens_scheduled(tokens) for clip in (ours, theirs)
        )
    assert mine.shape == (1, 128, 64)
    assert_equal_conditioning({"cond": mine, **extras}, {"cond": expected, **wanted})


def test_byt5_of_hunyuan_image() -> None:
    """The glyph encoder is a T5 too, and is replaced. Qwen beside it has no toy size; a CLIP stands for it."""
    import comfy.sd
    from comfy.sd1_clip import SDClipModel
    from comfy.text_encoders.hunyuan_image import ByT5SmallModel, ByT5SmallTokenizer

    from comfy_nai_t5.clip import EncoderModel, describe, t5_models, with_our_t5
    from comfy_nai_t5.encode import tokenize
    from comfy_nai_t5.families import server_config

    class GlyphModel(torch.nn.Module):
        def __init__(self, device: Any, dtype: Any, model_options: dict[str, Any]) -> None:
            super().__init__()
            self.dtypes = {dtype}
            self.other = SDClipModel(device=device, dtype=dtype, model_options={"model_config": dict(_TOY_CLIP)})
            self.byt5_small = ByT5SmallModel(device=device, dtype=dtype, model_options=model_options)

    glyphs = server_config(V1_1.model_copy(update={"vocab_size": 1510}))
    options = {"_model_config": glyphs, "dtype": torch.float32}  # ComfyUI gives the glyph encoder no name
    target = type("Target", (), {"params": {}, "clip": GlyphModel, "tokenizer": lambda **_: None})
    theirs = comfy.sd.CLIP(target, model_options=options)
    theirs.cond_stage_model.load_state_dict(random_weights(theirs.cond_stage_model))
    ours = with_our_t5(theirs, Settings("float32"))
    assert isinstance(t5_models(ours.cond_stage_model)["byt5_small"].transformer, EncoderModel)
    assert describe(ours) == f"byt5_small: ByT5 of 3 layers, float32, {FUSED}"
    pairs = ByT5SmallTokenizer().tokenize_with_weights('Text "Straße". Text "猫". ')
    with torch.inference_mode():
        mine, expected = (clip.cond_stage_model.byt5_small.encode_token_weights(pairs)[0] for clip in (ours, theirs))
    assert expected.shape[1] > 20 and error(mine, expected) < 1e-4
    assert ours.cond_stage_model.other is theirs.cond_stage_model.other
    without = type("Clip", (), {"tokenize": lambda self, text: {"qwen25_7b": []}})()
    with pytest.raises(ValueError, match="tokens for qwen25_7b, and none for a T5"):
        tokenize(without, "no quoted words")


def test_saved_files_are_those_of_stock(tmp_path: Path) -> None:
    from comfy_nai_t5.clip import with_our_t5

    theirs = stock(toy_file(tmp_path, UMT5), "wan")
    ours, expected = with_our_t5(theirs, Settings("float32")).get_sd(), theirs.get_sd()
    assert ours.keys() == expected.keys() and "spiece_model" in ours
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------------------------------------------------------
# The table of families
# ---------------------------------------------------------------------------------------------------------------------


class Chosen(Exception):  # noqa: N818 - it stops ComfyUI's loader where it has chosen its classes
    """Carries what was chosen."""


def test_every_family_has_a_toy() -> None:
    from comfy_nai_t5.families import FAMILIES

    assert {*FAMILY_CONFIGS, "t5"} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_the_table_has_the_classes_that_comfyui_chooses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.sd

    from comfy_nai_t5.families import FAMILIES
    from nai_t5_core.facts.config import encoder_tensors, named_config

    if not knows(name):
        pytest.skip(f"this ComfyUI is older than {name}")
    size = FAMILIES[name].checkpoint.rpartition("/")[2]
    shapes = encoder_tensors(named_config(size).encoder_only())
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}

    def chosen(target: Any, **_: Any) -> None:
        raise Chosen(target)

    monkeypatch.setattr(comfy.sd, "CLIP", chosen)
    clip_type = getattr(comfy.sd.CLIPType, name.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)  # AuraFlow has none
    with pytest.raises(Chosen) as caught:
        comfy.sd.load_text_encoder_state_dicts([state], clip_type=clip_type)
    (target,) = caught.value.args
    model, tokenizer = FAMILIES[name].classes()
    assert target.tokenizer is tokenizer
    assert target.clip.__qualname__ == model.__qualname__


def test_a_family_keeps_its_own_sizes(tmp_path: Path) -> None:
    from comfy_nai_t5.families import FAMILIES

    with pytest.raises(ValueError, match=r"Mochi was trained with a T5 v1\.1 of width 4096; this file holds"):
        FAMILIES["mochi"].check(V1_1)
    assert replace(FAMILIES["mochi"], checkpoint=None) == toy_family("mochi")
    assert toy_state(UMT5)["spiece_model"].dtype == torch.uint8


def test_out_of_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_nai_t5.clip import with_our_t5
    from comfy_nai_t5.stack import SharedStack

    clip = with_our_t5(stock(toy_file(tmp_path, V1_1), "mochi"), Settings("float32"))
    with monkeypatch.context() as without_memory:
        without_memory.setattr(SharedStack, "forward", lambda *_, **__: torch.empty(1 << 50))
        with pytest.raises(MemoryError, match=r"memory ran out while the T5 encoded 1 × .*; use a shorter prompt"):
            conditioning(clip, "a cat")
    assert conditioning(clip, "a cat")["cond"].isfinite().all()
