"""A CLIP that keeps its embeddings, and whose files are read late, gives what one gives that does neither."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import scaled_float8, write_file
from comfy_toys import (
    FAMILY_CONFIGS,
    V1_1,
    assert_equal_conditioning,
    conditioning,
    error,
    knows,
    require_comfyui,
    toy_file,
    toy_lora,
    toy_state,
)

from comfy_nai_t5.choices import Settings
from nai_t5_core.prompts.cache.store import Store

require_comfyui()

PROMPTS = ["a photo of a cat", "a (photo:1.3) of ((a cat)) on a [sofa], (blurry:0.4)", ""]
FLOAT32 = Settings("float32", cache="on")
PLAIN = Settings("float32")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """What the choice "on" means."""
    from comfy_nai_t5 import clip, late

    ours = Store(tmp_path / "store")
    for module in (clip, late):
        monkeypatch.setattr(module, "store_for", lambda choice: ours)
    return ours


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families take a T5 of any size."""
    from comfy_toys import toy_family

    from comfy_nai_t5 import late, loaders

    for module in (late, loaders):
        monkeypatch.setattr(module, "family_for", lambda config, name: toy_family(name))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read."""
    from comfy_nai_t5 import late

    found: list[str] = []
    really = late.load_t5
    monkeypatch.setattr(
        late, "load_t5", lambda path, *rest, **more: found.append(str(path)) or really(path, *rest, **more)
    )
    return found


def late(path: Path | None, family: str = "ltxv", settings: Settings = FLOAT32) -> Any:
    from comfy_nai_t5.late import late_t5

    return late_t5(path, family, settings)


def plain(path: Path | None, family: str = "ltxv", settings: Settings = PLAIN) -> Any:
    from comfy_nai_t5.loaders import load_t5

    return load_t5(path, family, settings)


@pytest.fixture(params=FAMILY_CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    if not knows(request.param):
        pytest.skip(f"this ComfyUI is older than {request.param}")
    return str(request.param)


@pytest.mark.usefixtures("any_size")
def test_every_family_comes_back_without_its_file(family: str, tmp_path: Path, store: Store, loads: list[str]) -> None:
    path = toy_file(tmp_path, FAMILY_CONFIGS[family])
    expected = [conditioning(plain(path, family), prompt) for prompt in PROMPTS]
    for turn in range(2):
        store.wait()
        store.memory.clear()
        clip = late(path, family)
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            assert_equal_conditioning(conditioning(clip, prompt), wanted)
        assert clip.cache.is_loaded == (turn == 0)
    assert len(loads) == 1 and store.counts.from_disk == len(PROMPTS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return toy_file(tmp_path, V1_1)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "LoRA": lambda clip: _with_lora(clip, 1.0),
    "strength": lambda clip: _with_lora(clip, 0.5),
    "another LoRA": lambda clip: _with_lora(clip, 1.0, seed=8),
    "two LoRAs": lambda clip: _with_lora(_with_lora(clip, 1.0), 1.0, seed=8),
    "last layer": lambda clip: _with_layer(clip, -2),
    "least length": lambda clip: _with_option(clip, "t5xxl_min_length", 200),
    "least padding": lambda clip: _with_option(clip, "t5xxl_min_padding", 150),
}


def _with_lora(clip: Any, strength: float, seed: int = 7) -> Any:
    import comfy.sd

    keys = ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.1.DenseReluDense.wo")
    shapes = clip.cond_stage_model.t5xxl.transformer
    lora = toy_lora(shapes, keys, "t5xxl", seed=seed)
    return comfy.sd.load_lora_for_models(None, clip, lora, 0, strength)[1]


def _with_layer(clip: Any, layer: int) -> Any:
    clip = clip.clone()
    clip.clip_layer(layer)
    return clip


def _with_option(clip: Any, name: str, value: int) -> Any:
    clip = clip.clone()
    clip.set_tokenizer_option(name, value)
    return clip


@pytest.mark.usefixtures("any_size")
def test_every_change_misses_and_comes_back(path: Path, store: Store, loads: list[str]) -> None:
    reference, prompt = plain(path), "a cat on a sofa"
    changes = {"none": lambda clip: clip, **CHANGES}
    for turn in range(2):
        clip = late(path)
        for number, (name, change) in enumerate(changes.items()):
            hits = store.counts.hits
            found = conditioning(change(clip), prompt)
            assert store.counts.hits - hits == turn, name
            assert_equal_conditioning(found, conditioning(change(reference), prompt))
            assert (number, turn) != (0, 1) or not clip.cache.is_loaded
        assert clip.cache.is_loaded == (turn == 0)
    assert len(loads) == 1


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize(
    ("asked", "answers"),
    [("takes_kernels", (True, False)), ("refuses_cuda_layers", (None, "not in this test"))],
    ids=["kernels for the CPU", "kernels for CUDA"],
)
def test_what_computes_is_in_the_key(
    asked: str, answers: tuple[Any, Any], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels and torch round at other places."""
    from comfy_nai_t5.clip import t5_models
    from comfy_nai_t5.clip_key import key_of

    clip = plain(path)
    tokens, models = clip.tokenize("a cat on a sofa"), t5_models(clip.cond_stage_model)
    found = []
    for answer in (*answers, answers[0]):
        monkeypatch.setattr(f"comfy_nai_t5.stack.{asked}", lambda *_, answer=answer: answer)
        found.append(key_of(clip, "a file", models, tokens, True))
    assert found[0] == found[2] != found[1]


@pytest.mark.usefixtures("any_size")
def test_files_and_settings_do_not_mix(path: Path, tmp_path: Path, store: Store) -> None:
    other = toy_file(tmp_path, V1_1, seed=1)
    cases = [
        (path, "ltxv", FLOAT32),
        (other, "ltxv", FLOAT32),
        (path, "mochi", FLOAT32),
        (path, "ltxv", Settings("bfloat16", cache="on")),
        (path, "ltxv", Settings("float32", layout="separate", cache="on")),
        (path, "ltxv", Settings("float32", weights="float8_e4m3fn", cache="on")),
    ]
    for case in cases:
        clip = late(*case)
        hits = store.counts.hits
        found = conditioning(clip, "a cat")
        assert store.counts.hits == hits and clip.cache.is_loaded
        again = late(*case)
        assert_equal_conditioning(conditioning(again, "a cat"), found, 1e-9)
        assert not again.cache.is_loaded


@pytest.mark.usefixtures("any_size")
def test_words_and_their_weights_are_in_the_key(path: Path, store: Store) -> None:
    clip, reference = late(path), plain(path)
    texts = ["a cat", "a (cat:1.1)", "a (cat:1.2)", "(a:1.1) cat", "a dog"]
    for _ in range(2):
        for text in texts:
            assert_equal_conditioning(conditioning(clip, text), conditioning(reference, text))
    assert (store.counts.misses, store.counts.hits) == (len(texts), len(texts))


@pytest.mark.usefixtures("any_size")
def test_an_embedding_in_the_prompt_is_in_the_key(
    path: Path, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [str(tmp_path)])
    reference, seen = plain(path), []
    for number in range(2):
        write_file(tmp_path / "style.safetensors", {"t5xxl": torch.full((2, 64), float(number))})
        clip = late(path)
        for _ in range(2):
            found = conditioning(clip, "a cat embedding:style")
            assert_equal_conditioning(found, conditioning(reference, "a cat embedding:style"))
        seen.append(found["cond"])
    assert error(*seen) > 0.01 and store.counts.hits == 2


@pytest.mark.usefixtures("any_size")
def test_scheduled_hooks_are_encoded(path: Path, store: Store) -> None:
    import comfy.hooks

    def hooked(clip: Any) -> Any:
        from comfy_extras.nodes_hooks import SetClipHooks

        keys = ("encoder.block.0.layer.0.SelfAttention.q",)
        lora = toy_lora(clip.cond_stage_model.t5xxl.transformer, keys, "t5xxl")
        hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=0.0, strength_clip=1.0)
        return SetClipHooks().apply_hooks(clip, schedule_clip=False, apply_to_conds=True, hooks=hooks)[0]

    clip, reference = late(path), plain(path)
    for _ in range(2):
        found, expected = conditioning(hooked(clip), "a cat"), conditioning(hooked(reference), "a cat")
        assert error(found["cond"], expected["cond"]) < 1e-4 and found.keys() == expected.keys()
    assert len(store.memory) == 0
    assert error(conditioning(clip, "a cat")["cond"], found["cond"]) > 1e-3


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("use", ["get_sd", "state_dict_for_saving", "get_key_patches", "load_model"])
def test_what_needs_the_weights_loads_them(use: str, path: Path, store: Store) -> None:
    import comfy.sd

    clip = late(path)
    if not hasattr(comfy.sd.CLIP, use):
        pytest.skip(f"this ComfyUI has no {use}")
    getattr(clip, use)()
    assert clip.cache.is_loaded
    expected = plain(path).patcher.model.state_dict()
    for name, tensor in clip.patcher.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.usefixtures("any_size")
def test_scaled_float8(tmp_path: Path, store: Store) -> None:
    spelling = "scale_weight"
    state = scaled_float8(toy_state(V1_1), spelling)[0]
    path = write_file(tmp_path / "fp8.safetensors", state)
    expected = conditioning(plain(path), "a cat")
    for turn in range(2):
        clip = late(path)
        assert_equal_conditioning(conditioning(clip, "a cat"), expected)
        assert clip.cache.is_loaded == (turn == 0)


@pytest.mark.usefixtures("any_size")
def test_replaced_in_a_loaded_clip(path: Path, store: Store) -> None:
    from comfy_nai_t5.clip import with_our_t5

    expected = conditioning(plain(path), "a cat")
    for turn in range(2):
        clip = with_our_t5(plain(path), FLOAT32)
        lora = _with_lora(clip, 1.0)
        assert_equal_conditioning(conditioning(lora, "a cat"), conditioning(_with_lora(plain(path), 1.0), "a cat"))
        # The weights are patched in memory now, and are known by what they were.
        again = with_our_t5(clip, FLOAT32)
        assert_equal_conditioning(conditioning(again, "a cat"), expected)
        assert store.counts.hits == 2 * turn


@pytest.mark.usefixtures("any_size")
def test_weights_that_are_not_there_are_told(path: Path, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    from comfy_nai_t5.clip import with_our_t5

    clip = plain(path)
    clip.patcher.model.t5xxl.transformer.shared.to("meta")
    assert with_our_t5(clip, FLOAT32).cache is None
    assert "not kept, since its weights are not in memory" in caplog.text


@pytest.mark.usefixtures("any_size")
def test_replaced_in_a_late_clip(path: Path, store: Store) -> None:
    """Without a cache of its own, too, it has to have the weights."""
    from comfy_nai_t5.clip import with_our_t5

    expected = conditioning(plain(path), "a cat")
    for settings in (PLAIN, FLOAT32):
        clip = with_our_t5(late(path), settings)
        assert_equal_conditioning(conditioning(clip, "a cat"), expected)


@pytest.mark.usefixtures("any_size")
def test_results_are_the_callers_own(path: Path, store: Store) -> None:
    clip = late(path)
    expected = conditioning(plain(path), "a cat")["cond"]
    for _ in range(3):
        found = conditioning(clip, "a cat")["cond"]
        assert error(found, expected) < 1e-4
        with torch.inference_mode():
            found.zero_()


@pytest.mark.usefixtures("any_size")
def test_a_file_that_was_changed_meanwhile_is_refused(path: Path, store: Store) -> None:
    clip = late(path)
    toy_file(path.parent, V1_1, seed=0).write_bytes(toy_file(path.parent, V1_1, seed=5).read_bytes())
    with pytest.raises(ValueError, match="run the loader again"):
        conditioning(clip, "a cat")


def test_joint_encoders_come_late(tmp_path: Path, store: Store) -> None:
    """Flux: a hit needs neither the T5 nor the CLIP-L, and another CLIP-L is another key."""
    from test_clip import _TOY_CLIP, toy_clip_l

    from comfy_nai_t5.late import late_with_clip
    from comfy_nai_t5.loaders import load_with_clip

    paths = [toy_clip_l(tmp_path), toy_file(tmp_path, V1_1)]
    options = {"model_config": dict(_TOY_CLIP)}
    expected = [conditioning(load_with_clip(paths, "flux", PLAIN, options), prompt) for prompt in PROMPTS]
    for turn in range(2):
        clip = late_with_clip(paths, "flux", FLOAT32, options)
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            assert_equal_conditioning(conditioning(clip, prompt), wanted)
        assert clip.cache.is_loaded == (turn == 0)
    other = write_file(tmp_path / "other" / "clip_l.safetensors", _one_more(paths[0]))
    clip = late_with_clip([other, paths[1]], "flux", FLOAT32, options)
    assert error(conditioning(clip, PROMPTS[0])["pooled_output"], expected[0]["pooled_output"]) > 1e-4
    assert clip.cache.is_loaded


def _one_more(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, each a little more."""
    from safetensors.torch import load_file

    return {name: tensor * 1.01 for name, tensor in load_file(path).items()}
