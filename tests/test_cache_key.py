"""The key of an embedding: what can change the result is in it, and what cannot is not.

Each case is one change of a base. Those that can change the result must all differ from the base and from each other;
those that cannot must all give the base's key.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import encoder_part, prefixed, scaled_float8, write_file, write_shards
from conftest import TOY_CONFIGS, random_state, write_hf_folder
from toy_loras import toy_lora

from nai_t5_core.backends.kernels.build import missing_for
from nai_t5_core.backends.kernels.sets import SETS
from nai_t5_core.backends.products import ONEDNN
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import LayerScales, unscaled
from nai_t5_core.lora.files import Lora
from nai_t5_core.prompts.cache import contents
from nai_t5_core.prompts.cache.contents import tensor_contents, weights_contents
from nai_t5_core.prompts.cache.key import Key, LoraUse, Settings
from nai_t5_core.prompts.cache.lora_contents import lora_contents
from nai_t5_core.prompts.cache.settings import settings_of
from nai_t5_core.prompts.choices import Choices
from nai_t5_core.weights.convert import convert
from nai_t5_core.weights.examine import examine

CONFIG = TOY_CONFIGS["v1.1"]
STATE = random_state(CONFIG)
IDS = [5, 17, 3, 1]
Change = Callable[[Path], Key]


def folder_with(folder: Path, config: T5Config = CONFIG, state: Mapping[str, torch.Tensor] = STATE) -> Path:
    return write_hf_folder(folder / "model", config, dict(state))


def of(ids: list[int] = IDS, **arguments: Any) -> Change:
    """The base with other arguments of loading, or other ids."""
    given = {"dtype": "float32", "device": "cpu", **arguments}
    return lambda folder: settings_of(folder_with(folder), **given).key(ids)


def with_pads(*pads: int, **values: Any) -> Change:
    """The base with the hidden states of pads kept, too."""
    return lambda folder: replace(settings_of(folder_with(folder), "float32", "cpu"), **values).key(IDS, pads)


def with_config(**values: Any) -> Change:
    config = CONFIG.model_copy(update=values)
    return lambda folder: settings_of(folder_with(folder, config), "float32", "cpu").key(IDS)


def with_settings(ids: list[int] = IDS, **values: Any) -> Change:
    """The base with settings that no argument of loading gives."""
    return lambda folder: replace(settings_of(folder_with(folder), "float32", "cpu"), **values).key(ids)


def in_file(make: Callable[[Path], Path]) -> Change:
    """The base's weights in another form."""
    return lambda folder: settings_of(make(folder), "float32", "cpu").key(IDS)


def one_bit_of(name: str) -> Change:
    def changed(folder: Path) -> Key:
        state = {**STATE, name: STATE[name].clone()}
        state[name].view(torch.int32).view(-1)[-1] ^= 1
        return settings_of(folder_with(folder, state=state), "float32", "cpu").key(IDS)

    return changed


def shards(folder: Path) -> Path:
    whole = folder_with(folder)
    index = write_shards(folder / "shards", STATE)
    (index.parent / "config.json").write_bytes((whole / "config.json").read_bytes())
    return index.parent


def converted(folder: Path, dtype: str = "auto", **arguments: Any) -> Path:
    return convert(folder_with(folder), folder / f"{dtype}.safetensors", dtype, **arguments).out


def with_header(folder: Path) -> Path:
    """The whole file again, with other words in its header."""
    from safetensors.torch import save_file

    model = folder_with(folder)
    save_file(STATE, model / "model.safetensors", metadata={"trained by": "somebody"})
    return model


def other_file(file: str) -> Change:
    """A file beside the weights."""

    def changed(folder: Path) -> Key:
        model = folder_with(folder)
        (model / file).write_text("something else")
        return settings_of(model, "float32", "cpu").key(IDS)

    return changed


STYLE, OTHER = toy_lora(CONFIG, seed=1, name="style"), toy_lora(CONFIG, seed=2, name="other")
VECTOR, OTHER_VECTOR = tensor_contents(torch.ones(64)), tensor_contents(torch.zeros(64))
A_NAIL_WIDER = unscaled(3).with_layer(1, LayerScales(feed_forward_out=0.5))

CHANGES: dict[str, Change] = {
    "the base": of(),
    # the model
    "a bit of a projection": one_bit_of("encoder.block.1.layer.1.DenseReluDense.wo.weight"),
    "a bit of the embedding": one_bit_of("shared.weight"),
    "a bit of a norm": one_bit_of("encoder.final_layer_norm.weight"),
    "epsilon": with_config(layer_norm_epsilon=1e-5),
    "distance": with_config(relative_attention_max_distance=64),
    "activation": with_config(activation="silu"),
    "rounded weights": in_file(
        lambda folder: write_file(folder / "x.safetensors", scaled_float8(STATE, "scale_weight")[0])
    ),
    "scales": of(scales=A_NAIL_WIDER),
    "other scales": of(scales=unscaled(3).with_layer(2, LayerScales(feed_forward_out=0.5))),
    # what is added to it
    "a LoRA": of(loras=[(STYLE, 1.0)]),
    "its strength": of(loras=[(STYLE, 0.5)]),
    "its sign": of(loras=[(STYLE, -0.5)]),
    "another LoRA": of(loras=[(OTHER, 1.0)]),
    "two LoRAs": of(loras=[(STYLE, 1.0), (OTHER, 0.5)]),
    "their order": of(loras=[(OTHER, 0.5), (STYLE, 1.0)]),
    "their strengths": of(loras=[(STYLE, 0.5), (OTHER, 1.0)]),
    "a LoRA twice": of(loras=[(STYLE, 1.0), (STYLE, 1.0)]),
    "a live LoRA": with_settings(loras=(LoraUse(lora_contents(STYLE), 1.0, "live"),)),
    "a vector for a word": with_settings([5, 96, 1], vectors={96: VECTOR}),
    "another vector": with_settings([5, 96, 1], vectors={96: OTHER_VECTOR}),
    # how it is computed
    "bfloat16": of(dtype="bfloat16"),
    "float64": of(dtype="float64"),
    "8 bits": with_settings(backend="cpu, 8 bits by kernels"),
    "compiled": of(compile=True),
    "compiled in a mode": of(compile="max-autotune"),
    "attention": of(attention="sdpa"),
    "layout": of(layout="separate"),
    # what is fed
    "another token": of([5, 18, 3, 1]),
    "order of tokens": of([17, 5, 3, 1]),
    "cut": of([5, 17, 1]),
    "a pad that is read": of([*IDS, 0]),
    "two pads that are read": of([*IDS, 0, 0]),
    "pads that are computed of another id": with_pads(7, 7),
    "of yet another": with_pads(8),
    "of several": with_pads(7, 8),
    "of the same in another order": with_pads(8, 7),
    "of one id and the usual one": with_pads(0, 7),
    "of a vector": with_pads(96, vectors={96: VECTOR}),
    "of another vector": with_pads(96, vectors={96: OTHER_VECTOR}),
}

NO_CHANGES: dict[str, Change] = {
    "again": of(),
    "another folder": lambda folder: of()(folder / "elsewhere"),
    "dropout": with_config(dropout_rate=0.3),
    "end token": with_config(eos_token_id=2),
    "a tied head": with_config(tie_word_embeddings=True),
    "config without the decoder": with_config(num_decoder_layers=0),
    "the decoder's weights": one_bit_of("decoder.final_layer_norm.weight"),
    "shards": in_file(shards),
    "words in the header": in_file(with_header),
    "a tokenizer beside it": other_file("README.md"),
    "ComfyUI's names": in_file(
        lambda folder: write_file(
            folder / "clip.safetensors", prefixed(encoder_part(STATE), "text_encoders.t5xxl.transformer.")
        )
    ),
    "scales of 1": of(scales=unscaled(3)),
    "a LoRA of strength 0": of(loras=[(STYLE, 0.0)]),
    "pads that are computed": with_pads(0, 0, 0),
    "a vector that is not fed": with_settings(vectors={96: VECTOR}),
}


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Key]:
    return {name: change(tmp_path_factory.mktemp("changed")) for name, change in CHANGES.items()}


def test_what_can_change_the_result_misses(changed: dict[str, Key]) -> None:
    pairs = list(combinations(changed, 2))
    assert len(pairs) > 400
    assert [(one, two) for one, two in pairs if changed[one].digest == changed[two].digest] == []
    assert [(one, two) for one, two in pairs if changed[one].text == changed[two].text] == []


def test_what_multiplies_on_this_processor_is_in_the_key(tmp_path: Path) -> None:
    """Each instruction set and oneDNN sum in another order; the best set has one key, however it was chosen."""
    usable = [instructions.name for instructions in SETS if missing_for(instructions) is None]
    products = [*usable, *(["onednn"] if ONEDNN.missing(torch.device("cpu"), torch.float32) is None else [])]
    keys = {name: of(products=name)(tmp_path).text for name in products}
    assert len(set(keys.values())) == len(products)
    if usable:
        assert of(products="kernels")(tmp_path).text == keys[usable[0]]


def test_every_choice_was_thought_of() -> None:
    """Of a choice that is new, somebody has to say here whether a change of it makes another key, and test it."""
    tested_here = {"dtype", "layout", "scales", "quantize", "compile", "attention", "loras", "products"}
    tested_elsewhere = {"device": "test_forecast", "optimize": "test_forecast", "unpack": "test_cache_quantised"}
    tested_elsewhere |= {"offload": "test_offload_users"}
    assert {field.name for field in fields(Choices)} == tested_here | tested_elsewhere.keys()


def test_the_number_of_computed_pads_makes_no_other_key() -> None:
    settings = Settings("0" * 64, CONFIG, "float32", "cpu")
    assert settings.key(IDS, [7]) == settings.key(IDS, [7, 7, 7]) != settings.key(IDS)


@pytest.mark.parametrize("name", NO_CHANGES)
def test_what_cannot_change_the_result_hits(name: str, changed: dict[str, Key], tmp_path: Path) -> None:
    assert NO_CHANGES[name](tmp_path) == changed["the base"]


def test_the_names_of_loras_are_nothing() -> None:
    assert lora_contents(STYLE) == lora_contents(Lora("renamed", STYLE.changes)) != lora_contents(OTHER)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_converted_file_is_known_by_its_weights_and_not_by_what_it_says(dtype: str, tmp_path: Path) -> None:
    """Its header keeps the hash of its source, also when somebody changes the file."""
    file = converted(tmp_path, dtype)
    before = weights_contents(examine(file))
    content = bytearray(file.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    content[length + json.loads(content[8:length])["shared.weight"]["data_offsets"][1] - 1] ^= 1
    file.write_bytes(content)
    assert weights_contents(examine(file)) != before


def test_what_is_no_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one id"):
        Settings("0" * 64, CONFIG, "float32", "cpu").key([])


# ---------------------------------------------------------------------------------------------------------------------
# The hash is made once
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was hashed, beside a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sources: list[str] = []
    by_reading = contents.contents_by_reading

    def counted(examination: Any) -> str:
        sources.append(examination.checkpoint.source)
        return by_reading(examination)

    monkeypatch.setattr(contents, "contents_by_reading", counted)
    return sources


def settled(folder: Path) -> Path:
    """A model that was not written just now, as far as its times tell."""
    model = folder_with(folder)
    os.utime(model / "model.safetensors", (1e9, 1e9))
    return model


def test_a_file_is_hashed_once(hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_SETTLED", -1.0)
    model = settled(tmp_path)
    assert len({weights_contents(examine(model)) for _ in range(3)}) == 1
    assert len(hashed) == 1


def test_a_file_that_was_written_just_now_is_hashed_again(hashed: list[str], tmp_path: Path) -> None:
    """Another change may get the same time."""
    model = folder_with(tmp_path)
    for _ in range(2):
        weights_contents(examine(model))
    assert len(hashed) == 2


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_changed_file_is_hashed_again(
    keeps_time: bool, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "_SETTLED", -1.0)
    model = settled(tmp_path)
    before = weights_contents(examine(model))
    time.sleep(0.02)  # a tick of the file system's clock
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    if keeps_time:
        os.utime(model / "model.safetensors", (1e9, 1e9))
    assert weights_contents(examine(model)) != before
    assert len(hashed) == 2


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"version": 1, "sha256": 3}', b"\xff\xfe"])
def test_a_damaged_memory_of_hashes_is_as_none(
    damage: bytes, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "_SETTLED", -1.0)
    model = settled(tmp_path)
    before = weights_contents(examine(model))
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_bytes(damage)
    assert weights_contents(examine(model)) == before
    assert len(hashed) == 2


def test_no_place_to_remember_a_hash_is_no_fault(
    hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(contents, "_SETTLED", -1.0)
    model = settled(tmp_path)
    assert weights_contents(examine(model)) == weights_contents(examine(model))
    assert len(hashed) == 2
