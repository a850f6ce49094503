"""Quantised files stay quantised in ComfyUI: values as in the library, and all that ComfyUI does to weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_file
from comfy_toys import (
    FUSED,
    KERNELS,
    assert_equal_conditioning,
    conditioning,
    error,
    require_comfyui,
    stock,
    toy_family,
    toy_lora,
)
from conftest import random_state
from test_patches import ATTENTION, DENSE, t5_of, with_lora
from torch import Tensor
from toy_gguf import write_gguf
from toy_quantised import READ, quantised, write_quantised

from comfy_nai_t5.choices import Settings
from nai_t5_core.backends.quantised.pieces import is_read
from nai_t5_core.facts.config import T5Config
from nai_t5_core.weights.load import load_encoder

require_comfyui()

# Rows are whole blocks of every kind.
CONFIG = T5Config(vocab_size=32128, d_model=256, d_kv=64, d_ff=512, num_heads=4, num_layers=2)
PROMPT = "a (photo:1.2) of a cat on a red sofa"
GGUF_KINDS = ("Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
# float8 without scales by row or block stays in ComfyUI's own modules.
OTHER_KINDS = tuple(name for name in READ if name != "float8")
EVERYWHERE = (
    *(ATTENTION.format(1, name) for name in "qkvo"),
    *(DENSE.format(0, name) for name in ("wi_0", "wi_1", "wo")),
    ATTENTION.format(0, "relative_attention_bias"),
    "shared",
)
FLOAT32 = Settings("float32")


def write_kind(folder: Path, kind: str, config: T5Config = CONFIG) -> Path:
    torch.manual_seed(5)
    state = random_state(config)
    if kind in GGUF_KINDS:
        return write_gguf(folder / f"{kind}.gguf", state, kind, config=config)
    tensors = quantised(state, READ[kind][1])
    # ComfyUI rounds patches of bfloat16 weights at random.
    tensors |= {name: state[name] for name in tensors if name in state and tensors[name].dtype == torch.bfloat16}
    return write_quantised(folder / "t5.safetensors", tensors)


def write_mixed(folder: Path) -> Path:
    """A file of int8 weights whose first layer is plain."""
    torch.manual_seed(5)
    state = random_state(CONFIG)
    first = {name: tensor for name, tensor in state.items() if name.startswith("encoder.block.0.")}
    others = {name: tensor for name, tensor in state.items() if name not in first}
    tensors = quantised(others, READ["int8"][1]) | first
    tensors |= {name: state[name] for name in tensors if name in state and tensors[name].dtype == torch.bfloat16}
    return write_quantised(folder / "mixed.safetensors", tensors)


def load(path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings = FLOAT32, family: str = "mochi") -> Any:
    from comfy_nai_t5 import families, loaders

    monkeypatch.setitem(families.FAMILIES, family, toy_family(family))
    return loaders.load_t5(path, family, settings)


def unpacked(folder: Path, path: Path) -> dict[str, Tensor]:
    """What the library makes of the file, in float32."""
    from nai_t5_core.weights.examine import examine

    found = examine(path)
    return {name: found.read(name).float() for name in random_state(CONFIG)}


def stock_of(folder: Path, path: Path) -> Any:
    """ComfyUI's own CLIP of the numbers of a quantised file."""
    return stock(write_file(folder / "unpacked.safetensors", unpacked(folder, path)), "mochi")


def told_of(kind: Any) -> str:
    """What the layout of a file is called all of whose projections are of a kind."""
    if not KERNELS:
        return "separate layout: its weights stay quantised"
    if is_read(kind):
        return f"{FUSED}, quantised weights"
    return f"separate layout: its weights stay quantised, in a kind that the kernels do not read ({kind.name})"


@torch.no_grad()
def by_library(path: Path, clip: Any, dtype: str = "float32") -> Tensor:
    pairs = clip.tokenize("a photo of a cat")["t5xxl"][0]
    ids = torch.tensor([[token for token, _ in pairs]])
    mask = (torch.arange(ids.shape[1]) <= ids[0].tolist().index(1))[None]
    stack = load_encoder(path, dtype, "cpu", layout="separate")
    return stack(ids, mask, padding="exact")


@pytest.mark.parametrize("kind", [*GGUF_KINDS, *OTHER_KINDS])
def test_values_are_those_of_the_library(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_nai_t5.clip import describe
    from comfy_nai_t5.quantised import Quantised, quantised_modules

    path = write_kind(tmp_path, kind)
    clip = load(path, monkeypatch)
    meant = unpacked(tmp_path, path)
    held = dict(quantised_modules(t5_of(clip)))
    assert len(held) >= 2 * 7 and all(isinstance(module, Quantised) for module in held.values())
    for name, tensor in meant.items():
        module = held.get(name.removesuffix(".weight"))
        if module is not None:
            assert torch.equal(module.numbers(torch.device("cpu")), tensor)
    assert describe(clip).endswith(told_of(next(iter(held.values())).kind)), describe(clip)
    mine = conditioning(clip, "a photo of a cat")["cond"]
    assert error(mine, by_library(path, clip)) < 1e-5
    half = load(path, monkeypatch, Settings("bfloat16"))
    assert error(conditioning(half, "a photo of a cat")["cond"], mine) < 5e-2


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "int8, rotated", "NVFP4", "NF4", "float8, by rows"])
def test_unpacked_where_that_is_chosen(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_kind(tmp_path, kind)
    clip = load(path, monkeypatch, Settings("float32", "unpack", layout="fused"))
    plain = t5_of(clip).encoder.block[0].layer[0].SelfAttention.q
    assert plain.weight.dtype in (torch.float32, torch.float16)
    expected = conditioning(load(path, monkeypatch), PROMPT)
    # Float16 rounds the numbers, and ComfyUI keeps norms and biases in what it keeps weights in.
    assert_equal_conditioning(conditioning(clip, PROMPT), expected, 2e-2)


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ("fused", "cannot run in the fused layout: its weights stay quantised.*; choose the layout auto"),
        ("packed", "the packed layout .*, which stay quantised as they are in this file: choose the layout auto"),
        ("int8", "the int8 layout .*, which stay quantised as they are in this file: choose the layout auto"),
    ],
)
def test_layouts_that_are_refused(layout: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_nai_t5.clip import describe

    # Of a kind that the kernels read, they compute the fused layout.
    path = write_kind(tmp_path, "float8 fnuz, by rows")
    with pytest.raises(ValueError, match=told):
        describe(load(path, monkeypatch, Settings("float32", layout=layout)))


def test_a_plain_layer_beside_quantised_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is joined, and computed as in any other file; nothing is in memory twice."""
    from comfy_nai_t5.clip import describe
    from comfy_nai_t5.quantised import quantised_modules

    path = write_mixed(tmp_path)
    clip, theirs = load(path, monkeypatch), stock_of(tmp_path, path)
    held = [name for name, _ in quantised_modules(t5_of(clip))]
    assert len(held) == 7 and all(name.startswith("encoder.block.1.") for name in held)
    others = ", quantised weights" if KERNELS else " but for 1 of 2 layers: its weights stay quantised"
    assert describe(clip).endswith(f"{FUSED}{others}"), describe(clip)
    assert 0.95 * path.stat().st_size < clip.patcher.model_size() <= path.stat().st_size
    assert_equal_conditioning(conditioning(clip, PROMPT), conditioning(theirs, PROMPT))
    assert clip.load_model().loaded_size() == clip.patcher.model_size() <= path.stat().st_size
    lora = toy_lora_of(theirs)
    mine, expected = (conditioning(with_lora(each, lora, 0.8), PROMPT) for each in (clip, theirs))
    assert_equal_conditioning(mine, expected)
    assert error(expected["cond"], conditioning(theirs, PROMPT)["cond"]) > 1e-3


KINDS_TO_PATCH = ["Q8_0", "Q4_K", "int8, rotated", "NF4", "NVFP4", "LLM.int8"]


@pytest.fixture(params=KINDS_TO_PATCH)
def pair(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Ours of a quantised file, and ComfyUI's of its numbers."""
    path = write_kind(tmp_path, request.param)
    return load(path, monkeypatch), stock_of(tmp_path, path)


def quantised_bytes(clip: Any) -> int:
    from comfy_nai_t5.quantised import quantised_modules

    return sum(module.quantised.nbytes for _, module in quantised_modules(clip.patcher.model))


def test_lora(pair: tuple[Any, Any]) -> None:
    """It is added in every call: the bytes stay, whatever is loaded."""
    ours, theirs = pair
    lora = toy_lora_of(theirs)
    before, plain = quantised_bytes(ours), conditioning(ours, PROMPT)
    for strength in (0.8, -0.3):
        mine = conditioning(with_lora(ours, lora, strength), PROMPT)
        expected = conditioning(with_lora(theirs, lora, strength), PROMPT)
        assert_equal_conditioning(mine, expected)
        assert error(expected["cond"], plain["cond"]) > 1e-3
    assert quantised_bytes(ours) == before
    assert torch.equal(conditioning(ours, PROMPT)["cond"], plain["cond"])


def toy_lora_of(clip: Any, seed: int = 7) -> dict[str, Tensor]:
    return toy_lora(t5_of(clip), EVERYWHERE, "t5xxl", seed=seed)


def test_loras_that_take_turns_and_add_up(pair: tuple[Any, Any]) -> None:
    _, theirs = pair
    first, second = toy_lora_of(theirs, 1), toy_lora_of(theirs, 2)
    one = [with_lora(clip, first, 0.5) for clip in pair]
    both = [with_lora(clip, second, 0.7) for clip in one]
    for mine, stock_one in (one, both, pair, one):
        assert_equal_conditioning(conditioning(mine, PROMPT), conditioning(stock_one, PROMPT))


def test_patches_that_are_no_products(pair: tuple[Any, Any]) -> None:
    """A weight set to another, the difference of a norm, and DoRA, whose magnitude is that of the rows."""
    q, norm = (f"t5xxl.transformer.encoder.block.1.layer.0.{name}.weight" for name in ("SelfAttention.q", "layer_norm"))
    patches = {q: ("set", (torch.randn(256, 256) / 16,)), norm: ("diff", (torch.rand(256),))}
    key = ATTENTION.format(1, "k")
    lora = toy_lora(t5_of(pair[1]), (key,), "t5xxl")
    lora[f"text_encoders.t5xxl.transformer.{key}.dora_scale"] = torch.rand(256, 1) + 0.5
    clones = [with_lora(clip, lora, 0.8) for clip in pair]
    for clone in clones:
        assert set(clone.add_patches(patches, 0.7)) == set(patches)
    assert_equal_conditioning(*(conditioning(clone, PROMPT) for clone in clones))


@pytest.mark.parametrize("scheduled", [False, True])
def test_hooks(pair: tuple[Any, Any], scheduled: bool) -> None:
    import comfy.hooks
    import nodes
    from comfy_extras.nodes_hooks import SetClipHooks

    lora, beneath, results = toy_lora_of(pair[1]), toy_lora_of(pair[1], 3), []
    for clip in pair:
        hooks = comfy.hooks.create_hook_lora(lora, 0, 1.0)
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
        frames.add(comfy.hooks.HookKeyframe(strength=0.3, start_percent=0.5))
        hooks.set_keyframes_on_hooks(frames)
        patched = with_lora(clip, beneath, 0.4)
        hooked = SetClipHooks().apply_hooks(patched, schedule_clip=scheduled, apply_to_conds=True, hooks=hooks)[0]
        with torch.inference_mode():
            results.append(
                [*nodes.CLIPTextEncode().encode(hooked, PROMPT)[0], *nodes.CLIPTextEncode().encode(clip, PROMPT)[0]]
            )
    mine, expected = results
    assert len(mine) == len(expected) == (3 if scheduled else 2)
    for ours_at, theirs_at in zip(mine, expected, strict=True):
        assert error(ours_at[0], theirs_at[0]) < 1e-4
    assert error(expected[0][0], expected[-1][0]) > 1e-3


def test_hooks_of_another_model(pair: tuple[Any, Any]) -> None:
    """They add the difference to the weights as they were before the LoRA beneath; and they come and go."""
    import comfy.hooks
    from comfy_extras.nodes_hooks import SetClipHooks

    generator = torch.Generator().manual_seed(11)
    state = comfy.hooks.get_patch_weights_from_model(pair[1].patcher)
    other = {
        key: value + 0.05 * torch.randn(value.shape, generator=generator)
        for key, value in state.items()
        if key.startswith("t5xxl.transformer.") and value.ndim == 2
    }
    beneath, results = toy_lora_of(pair[1], 3), []
    for clip in pair:
        patched = with_lora(clip, beneath, 0.4)
        hooks = comfy.hooks.create_hook_model_as_lora(None, other, 0, 0.7)
        hooked = SetClipHooks().apply_hooks(patched, schedule_clip=False, apply_to_conds=True, hooks=hooks)[0]
        results.append([conditioning(each, PROMPT)["cond"] for each in (hooked, hooked, patched, hooked)])
    mine, expected = results
    for ours_at, theirs_at in zip(mine, expected, strict=True):
        assert error(ours_at, theirs_at) < 1e-4
    assert error(expected[1], expected[2]) > 1e-3


def test_merging(pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one of another kind; ComfyUI asks either for its numbers."""
    from comfy_extras.nodes_model_merging import CLIPMergeSimple

    (tmp_path / "other").mkdir()
    path = write_kind(tmp_path / "other", "Q5_1")
    other = load(path, monkeypatch), stock_of(tmp_path / "other", path)
    for first, second in ((pair, other), (other, pair)):
        mine, expected = (CLIPMergeSimple().merge(a, b, 0.4)[0] for a, b in zip(first, second, strict=True))
        assert_equal_conditioning(conditioning(mine, PROMPT), conditioning(expected, PROMPT))


@pytest.mark.parametrize("budget", [1, 700_000])
def test_partial_loading(pair: tuple[Any, Any], budget: int) -> None:
    """Nothing, or about half of the layers, fits on the device; and what is there is taken off it again."""
    from comfy.model_patcher import wipe_lowvram_weight

    ours, theirs = pair
    lora = toy_lora_of(theirs)
    expected = conditioning(with_lora(theirs, lora, 1.0), PROMPT)["cond"]
    patched = with_lora(ours, lora, 1.0)
    device = torch.device("cpu")
    for module in patched.patcher.model.modules():
        wipe_lowvram_weight(module)  # on a CPU, ComfyUI has loaded everything already; with a GPU, nothing
    patched.patcher.patch_model(device, lowvram_model_memory=budget)
    assert patched.patcher.model.model_lowvram

    def encoded() -> Tensor:
        with torch.inference_mode():
            return patched.cond_stage_model.encode_token_weights(patched.tokenize(PROMPT))[0]

    assert error(encoded(), expected) < 1e-4
    patched.patcher.partially_unload(device, 1e9)
    assert error(encoded(), expected) < 1e-4
    patched.patcher.detach()
    assert_equal_conditioning(conditioning(ours, PROMPT), conditioning(theirs, PROMPT))


def test_unloading_and_loading_again(pair: tuple[Any, Any]) -> None:
    import comfy.model_management

    ours, theirs = pair
    patched = with_lora(ours, toy_lora_of(theirs), 1.0)
    before = conditioning(patched, PROMPT), conditioning(ours, PROMPT)
    for _ in range(2):
        comfy.model_management.unload_all_models()
        assert torch.equal(conditioning(patched, PROMPT)["cond"], before[0]["cond"])
        comfy.model_management.unload_all_models()
        assert torch.equal(conditioning(ours, PROMPT)["cond"], before[1]["cond"])


def test_moving_takes_bytes_along(pair: tuple[Any, Any]) -> None:
    """Also where everything is cast at once: of quantised weights nothing is."""
    ours, _ = pair
    before = conditioning(ours, PROMPT)["cond"]
    module = t5_of(ours).encoder.block[0].layer[0].SelfAttention.q
    parts = module.quantised.parts
    module.half()
    assert all(
        torch.equal(module.quantised.parts[name].view(torch.uint8), part.view(torch.uint8))
        for name, part in parts.items()
        if part.ndim
    )
    assert torch.equal(conditioning(ours, PROMPT)["cond"], before)
    on_meta = module.to("meta")
    assert on_meta.weight.is_meta and all(part.is_meta for part in on_meta.quantised.parts.values())


def test_saved_files_hold_numbers(pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the LoRAs that are in force, as ComfyUI's node for it writes them."""
    import folder_paths
    from comfy_extras.nodes_model_merging import CLIPSave

    ours, theirs = pair
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "out"))
    patched = with_lora(ours, toy_lora_of(theirs), 0.5)
    save = CLIPSave()
    save.output_dir = str(tmp_path / "out")
    saved = save.execute(patched, "clip/saved") if hasattr(save, "execute") else save.save(patched, "clip/saved")
    (file,) = (tmp_path / "out").rglob("*.safetensors")
    assert saved is not None
    expected = conditioning(patched, PROMPT)
    assert_equal_conditioning(conditioning(stock(file, "mochi"), PROMPT), expected, 1e-2)
    assert_equal_conditioning(conditioning(load(file, monkeypatch), PROMPT), expected, 1e-2)


def test_tables_that_are_patched(pair: tuple[Any, Any]) -> None:
    _, theirs = pair
    lora = toy_lora(t5_of(theirs), ("shared",), "t5xxl")
    mine, expected = (conditioning(with_lora(clip, lora, 1.0), PROMPT) for clip in pair)
    assert_equal_conditioning(mine, expected)
    assert error(expected["cond"], conditioning(theirs, PROMPT)["cond"]) > 1e-3


def test_flux(tmp_path: Path) -> None:
    """Beside a text encoder that is not quantised, and that stays ComfyUI's."""
    from test_clip import _TOY_CLIP, toy_clip_l

    from comfy_nai_t5.loaders import load_with_clip

    options = {"model_config": dict(_TOY_CLIP), "dtype": torch.float32}
    path = write_kind(tmp_path, "Q8_0")
    meant = write_file(tmp_path / "unpacked.safetensors", unpacked(tmp_path, path))
    clip_l = toy_clip_l(tmp_path)
    ours, expected = (
        load_with_clip([clip_l, file], "flux", Settings("float32", "file"), model_options=options)
        for file in (path, meant)
    )
    assert_equal_conditioning(conditioning(ours, PROMPT), conditioning(expected, PROMPT))
    lora = toy_lora(t5_of(ours), EVERYWHERE, "t5xxl")
    mine, stock_one = (conditioning(with_lora(clip, lora, 0.7), PROMPT) for clip in (ours, expected))
    assert_equal_conditioning(mine, stock_one)
    assert error(stock_one["cond"], conditioning(expected, PROMPT)["cond"]) > 1e-3
