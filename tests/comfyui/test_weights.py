"""Weights of all kinds, and what is computed in."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import scaled_float8, spiece_model, write_file, write_shards
from comfy_toys import (
    UMT5,
    V1_0,
    V1_1,
    assert_equal_conditioning,
    conditioning,
    error,
    needs_8_bits,
    require_comfyui,
    stock,
    toy_family,
    toy_file,
    toy_state,
)
from conftest import build_stack, random_state
from torch import Tensor

from comfy_nai_t5.choices import Settings
from nai_t5_core.facts.config import T5Config
from nai_t5_core.tokenizer import sentencepiece_to_tokenizer_json

require_comfyui()

PROMPT = "a photo of a cat on a red sofa"


def load(path: Path, family: str, monkeypatch: pytest.MonkeyPatch, **choices: Any) -> Any:
    """Our loader, with a family that takes toys."""
    from comfy_nai_t5 import families, loaders

    monkeypatch.setitem(families.FAMILIES, family, toy_family(family))
    return loaders.load_t5(path, family, Settings(**choices))


@torch.no_grad()
def exact(clip: Any, config: T5Config, state: dict[str, Tensor], family: str) -> Tensor:
    """What the library makes in float64 of the tokens that a CLIP makes of the prompt."""
    pairs = clip.tokenize(PROMPT)[toy_family(family).slot][0]
    ids = torch.tensor([[token for token, _ in pairs]])
    mask = (torch.arange(ids.shape[1]) <= ids[0].tolist().index(config.eos_token_id))[None]
    stack = build_stack(config, {name: tensor.double() for name, tensor in state.items()}, torch.float64, "separate")
    return stack(ids, mask, padding="skip" if family in ("wan", "cosmos") else "exact")


@pytest.mark.parametrize("layout", ["auto", "packed", pytest.param("int8", marks=needs_8_bits)])
@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize(("family", "config"), [("mochi", V1_1), ("wan", UMT5), ("cosmos", V1_0)])
def test_scaled_float8(
    family: str, config: T5Config, spelling: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = toy_state(config)
    weights = {name: tensor for name, tensor in state.items() if name != "spiece_model"}
    stored, meant = scaled_float8(weights, spelling)
    path = write_file(tmp_path / "scaled.safetensors", stored | {k: v for k, v in state.items() if k not in weights})
    clip = load(path, family, monkeypatch, dtype="float32", layout=layout)
    assert error(conditioning(clip, PROMPT)["cond"], exact(clip, config, meant, family)) < 1e-4
    kept = clip.cond_stage_model.state_dict()
    for name, tensor in stored.items():
        if tensor.dtype == torch.float8_e4m3fn and name != "scaled_fp8":
            assert kept[f"{toy_family(family).slot}.transformer.{name}"].dtype == tensor.dtype
    for dtype, limit in (("bfloat16", 3e-2), ("float16", 5e-3)):
        half = load(path, family, monkeypatch, dtype=dtype, layout="auto" if dtype == "float16" else layout)
        assert error(conditioning(half, PROMPT)["cond"], exact(clip, config, meant, family)) < limit


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_weights_as_they_are_in_the_file(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Norms are never in float8.
    keeps = {name for name, tensor in toy_state(V1_1).items() if dtype.itemsize == 1 and tensor.ndim == 1}
    stored = {name: tensor if name in keeps else tensor.to(dtype) for name, tensor in toy_state(V1_1).items()}
    meant = {name: tensor.float() for name, tensor in stored.items()}
    clip = load(write_file(tmp_path / "toy.safetensors", stored), "ltxv", monkeypatch, dtype="float32", weights="file")
    assert error(conditioning(clip, PROMPT)["cond"], exact(clip, V1_1, meant, "ltxv")) < 1e-4


@pytest.mark.parametrize("weights", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_on_request_halves_the_memory(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = toy_state(V1_1)
    path = write_file(tmp_path / "toy.safetensors", state)
    clip = load(path, "ltxv", monkeypatch, dtype="float32", weights=weights)
    linears = [name for name in state if name.endswith((".q.weight", ".wo.weight"))]
    small = clip.cond_stage_model.t5xxl.transformer.state_dict()
    assert all(small[name].dtype == getattr(torch, weights) for name in linears)
    assert clip.patcher.model_size() < stock(path, "ltxv").patcher.model_size()
    meant = {name: small[name].float() for name in state}
    assert error(conditioning(clip, PROMPT)["cond"], exact(clip, V1_1, meant, "ltxv")) < 1e-4


def test_auto_keeps_weights_as_computed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = load(toy_file(tmp_path, V1_1), "ltxv", monkeypatch, dtype="bfloat16")
    t5 = clip.cond_stage_model.t5xxl.transformer
    assert t5.encoder.block[0].layer[0].SelfAttention.q.weight.dtype == t5.shared.weight.dtype == torch.bfloat16
    assert t5.encoder.final_layer_norm.weight.dtype == torch.float32


def bytes_alive() -> int:
    """Of all tensors in this process, each storage counted once."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter) and not thing.is_meta)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def test_casting_holds_one_tensor_twice_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_nai_t5 import loaders

    path = toy_file(tmp_path, V1_1)
    size = sum(tensor.nbytes for tensor in toy_state(V1_1).values())
    cast, seen = loaders._cast, []

    def watched(*arguments: Any) -> None:
        seen.append(bytes_alive())
        cast(*arguments)

    monkeypatch.setattr(loaders, "_cast", watched)
    before = bytes_alive()
    clip = load(path, "mochi", monkeypatch, dtype="bfloat16")
    assert len(seen) == 3 * 7 + 2 and max(seen) - before < 1.1 * size  # not those of the file as well
    assert bytes_alive() - before < 0.6 * size  # four bytes became two
    assert clip.cond_stage_model.t5xxl.transformer.shared.weight.dtype == torch.bfloat16


def test_shards_and_files_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nai_t5_core import convert

    state = toy_state(V1_1)
    expected = conditioning(load(toy_file(tmp_path, V1_1), "mochi", monkeypatch, dtype="float32"), PROMPT)
    index = write_shards(tmp_path / "shards", state)
    shard = sorted(index.parent.glob("*.safetensors"))[1]
    convert(toy_file(tmp_path, V1_1), tmp_path / "own.safetensors", dtype="float32")
    for path in (shard, tmp_path / "own.safetensors"):
        assert_equal_conditioning(conditioning(load(path, "mochi", monkeypatch, dtype="float32"), PROMPT), expected)


@pytest.mark.parametrize("family", ["wan", "ace"])
def test_folders_whose_tokenizer_is_in_json(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = write_file(tmp_path / "folder" / "model.safetensors", random_state(UMT5))
    (tmp_path / "folder" / "tokenizer.json").write_bytes(sentencepiece_to_tokenizer_json(spiece_model()))
    loaded = load(weights, family, monkeypatch, dtype="float32")
    expected = load(toy_file(tmp_path, UMT5), family, monkeypatch, dtype="float32")
    for text in (PROMPT, "(Ünïcode:1.2), 猫 and   spaces", ""):
        assert loaded.tokenize(text) == expected.tokenize(text)
        assert_equal_conditioning(conditioning(loaded, text), conditioning(expected, text))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_closer_to_float32_than_a_cast(dtype: str, tmp_path: Path) -> None:
    """Stock modules run in the small dtype throughout, residual and norms too: that is what a cast alone would give."""
    from comfy_nai_t5.clip import with_our_t5

    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    owner = theirs.cond_stage_model.t5xxl
    with torch.inference_mode():
        tokens = [[token for token, _ in theirs.tokenize(PROMPT)["t5xxl"][0]]]
        embeds, mask, _, _ = owner.process_tokens(tokens, "cpu")
        cast = owner.transformer(None, mask, embeds=embeds.to(getattr(torch, dtype)))[0].float()
    expected = conditioning(theirs, PROMPT)["cond"]
    ours = conditioning(with_our_t5(theirs, Settings(dtype)), PROMPT)["cond"]
    assert error(ours, expected) < error(cast, expected)


def test_float16_beyond_its_range(tmp_path: Path) -> None:
    """Hidden products of some 10^6: stock in float16 gives NaN, ours scales the layer and says so."""
    from comfy_nai_t5.clip import with_our_t5
    from nai_t5_core.float16.guard import ScaleTightenedWarning

    state = toy_state(V1_1)
    for name in ("wi_0", "wi_1"):
        state[f"encoder.block.1.layer.1.DenseReluDense.{name}.weight"] *= 300
    theirs = stock(write_file(tmp_path / "loud.safetensors", state), "mochi")
    ours = with_our_t5(theirs, Settings("float16"))
    with pytest.warns(ScaleTightenedWarning):
        actual = conditioning(ours, PROMPT)["cond"]
    assert error(actual, conditioning(theirs, PROMPT)["cond"]) < 5e-3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2, 2)}, "is no T5: it looks like a CLIP"),
        ({"decoder.up.0.weight": torch.zeros(2, 2)}, "is no T5: it looks like a VAE"),
    ],
)
def test_other_files_are_refused(content: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    from comfy_nai_t5.loaders import load_t5

    with pytest.raises(ValueError, match=message):
        load_t5(write_file(tmp_path / "other.safetensors", content))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    from comfy_nai_t5.loaders import load_t5

    path = toy_file(tmp_path, V1_1)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="fetch it again"):
        load_t5(path)
    incomplete = toy_state(V1_1)
    del incomplete["encoder.block.1.layer.0.SelfAttention.k.weight"]
    with pytest.raises(ValueError, match=r"block\.1\.layer\.0\.SelfAttention\.k\.weight is missing"):
        load_t5(write_file(tmp_path / "incomplete.safetensors", incomplete))


def test_clips_without_a_t5_are_refused(tmp_path: Path) -> None:
    import comfy.sd
    from comfy import sd1_clip

    from comfy_nai_t5.clip import with_our_t5
    from comfy_nai_t5.loaders import load_with_clip

    target = type("Target", (), {"params": {}, "clip": sd1_clip.SD1ClipModel, "tokenizer": sd1_clip.SD1Tokenizer})
    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    clip = comfy.sd.CLIP(target, model_options={"clip_l_model_config": small})
    with pytest.raises(ValueError, match="holds no T5 but clip_l"):
        with_our_t5(clip)
    no_t5 = write_file(tmp_path / "clip.safetensors", {"text_model.x": torch.zeros(2)})
    with pytest.raises(ValueError, match="none of these files holds a T5"):
        load_with_clip([no_t5, no_t5], "flux")


def test_unknown_choices_are_refused() -> None:
    from comfy_nai_t5.loaders import load_t5, load_with_clip

    with pytest.raises(ValueError, match="unknown family 'pixel'; known: auto, pixart"):
        load_t5(None, "pixel")
    with pytest.raises(ValueError, match="unknown choice 'int4' for weights"):
        load_t5(None, settings=Settings(weights="int4"))
    with pytest.raises(ValueError, match="unknown choice 'int8' for dtype"):
        load_t5(None, settings=Settings("int8"))
    with pytest.raises(ValueError, match="unknown family 'wan'; allowed: flux"):
        load_with_clip([], "wan")


def test_newer_servers_can_load_it_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = load(toy_file(tmp_path, V1_1), "mochi", monkeypatch, dtype="bfloat16")
    if not hasattr(clip.patcher, "cached_patcher_init"):
        pytest.skip("this ComfyUI is older than dynamic memory")
    function, arguments = clip.patcher.cached_patcher_init
    again = function(*arguments, disable_dynamic=True)
    assert again.model is not clip.patcher.model
    expected = clip.patcher.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())
