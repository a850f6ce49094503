"""The hash of quantised weights: everything that stands for a weight is in it, in a file and in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import encoder_part
from conftest import needs_kernels, random_state
from test_quantised_files import CONFIG, QUERY, SAFETENSORS, state_of
from toy_quantised import READ, Tensors, note, write_quantised

from nai_t5_core.backends.kernels import build
from nai_t5_core.backends.kernels.calls import counted
from nai_t5_core.backends.kernels.sets import AVX2
from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.facts.scales import StackScales, unscaled
from nai_t5_core.prompts.cache.contents import contents_by_reading, weights_contents
from nai_t5_core.prompts.cache.settings import settings_for, settings_of
from nai_t5_core.prompts.choices import Choices
from nai_t5_core.prompts.loading import finish, load_chosen
from nai_t5_core.weights.examine import Examination, examine

# What notes of a kind say in another way, so that the same bytes mean other numbers.
NOTES = {
    "NF4": ("weight.quant_state.bitsandbytes__nf4", {"nested_offset": 0.08}),
    "FP4": ("weight.quant_state.bitsandbytes__fp4", {"nested_offset": 0.08}),
    "int8, rotated": ("comfy_quant", {"convrot_groupsize": 64}),
}
SAYS_HOW = ("comfy_quant", "quant_state", "weight_format")


def variants(name: str) -> dict[str, Tensors]:
    """A file of a kind, and the same file with one part of one weight changed, by what was changed."""
    state = state_of(name)
    found = {"nothing": state}
    for key in [key for key in state if key.startswith(f"{QUERY}.") and not any(how in key for how in SAYS_HOW)]:
        changed = state[key].clone()
        changed.reshape(-1).view(torch.uint8)[-1] ^= 1
        found[key] = {**state, key: changed}
    if name in NOTES:
        leaf, told = NOTES[name]
        before = bytes(state[f"{QUERY}.{leaf}"].tolist()).decode()
        after = {**json.loads(before), **told}
        found[leaf] = {**state, f"{QUERY}.{leaf}": note(**after)}
    return found


@SAFETENSORS
def test_every_part_of_a_weight_is_in_the_hash(name: str, tmp_path: Path) -> None:
    examined: dict[str, Examination] = {}
    for number, (changed, state) in enumerate(variants(name).items()):
        examined[changed] = examine(write_quantised(tmp_path / f"{number}.safetensors", state))
    assert len(examined) >= (2 if READ[name][0] == "float8_e5m2" else 3)
    for contents in (weights_contents, contents_by_reading):
        hashes = {changed: contents(examination) for changed, examination in examined.items()}
        assert [pair for pair in combinations(hashes, 2) if hashes[pair[0]] == hashes[pair[1]]] == []


def test_the_same_bytes_of_another_kind_are_another_weight(tmp_path: Path) -> None:
    """A rotation is told by a note alone, wherever it stands."""
    state = state_of("int8, rotated")
    plain = {
        key: note(format="int8_tensorwise") if key.endswith("comfy_quant") else value for key, value in state.items()
    }
    files = [write_quantised(tmp_path / f"{number}.safetensors", some) for number, some in enumerate((state, plain))]
    assert len({weights_contents(examine(file)) for file in files}) == 2


@pytest.mark.parametrize("name", [*READ, "GGML"])
def test_a_kind_is_printed_the_same_in_every_process(name: str, tmp_path: Path) -> None:
    if name == "GGML":
        kinds = set(map(repr, GGML_KINDS.values()))
        assert len(kinds) == len(GGML_KINDS)
    else:
        stored = examine(write_quantised(tmp_path / "t5.safetensors", state_of(name))).quantised
        kinds = {repr(one.kind) for one in stored.values()}
    assert not any("0x" in kind for kind in kinds)


@SAFETENSORS
def test_how_a_quantised_file_is_computed_is_in_the_key(name: str, tmp_path: Path) -> None:
    """As it lies, unpacked into either dtype, in 8 bits of its exact numbers, and in 8 bits of unpacked ones."""
    file = write_quantised(tmp_path / "file.safetensors", state_of(name))
    ways: list[dict[str, Any]] = [{}, {"unpack": True}, {"quantize": "int8"}, {"quantize": "int8", "unpack": True}]
    keys = {
        settings_of(file, dtype, "cpu", **way).key([5, 1]).text for dtype in ("float32", "bfloat16") for way in ways
    }
    assert len(keys) == 2 * len(ways)
    compiled = [
        settings_of(file, "float32", "cpu", compile=True, unpack=unpack).key([5, 1]) for unpack in (True, False)
    ]
    assert compiled[0] == compiled[1], "what is compiled is unpacked in any case"


def with_a_plain_layer(name: str) -> Tensors:
    """A quantised file's tensors, the first layer of which is plain."""
    plain, first = encoder_part(random_state(CONFIG)), "encoder.block.0."
    state = {key: value for key, value in state_of(name).items() if not key.startswith(first)}
    return {**state, **{key: plain[key] for key in plain if key.startswith(first)}}


PARTLY = {
    "unread kinds, a plain layer": (with_a_plain_layer("float8 fnuz, by rows"), "float32"),
    "read kinds, a plain layer": (with_a_plain_layer("int8"), "float32"),
    "read kinds, a layer with scales": (state_of("int8"), "float16"),
    "plain weights, a layer with scales": (encoder_part(random_state(CONFIG)), "float16"),
}


@needs_kernels
@pytest.mark.parametrize("what", PARTLY)
@torch.no_grad()
def test_what_computes_some_layers_is_in_the_key(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is left to the kernels where they can compute it: so two processors may differ in some alone."""
    state, dtype = PARTLY[what]
    file = write_quantised(tmp_path / "file.safetensors", state)
    first, *others = unscaled(CONFIG.num_layers).layers
    scales = StackScales((replace(first, feed_forward_out=0.5), *others)) if "scales" in what else None
    told: dict[str, set[bool]] = {}
    for flags in (frozenset(), AVX2.needs):
        monkeypatch.setattr(build, "_processor_flags", lambda flags=flags: flags)
        how = Choices(dtype, "cpu", scales=scales or "auto", optimize=False)
        stack = finish(load_chosen(file, "", how).stack, how)
        with counted() as kernels:
            stack(torch.tensor([[5, 6, 1]]))
        told.setdefault(settings_for(examine(file), how).backend, set()).add(bool(kernels.flops))
    assert sorted(told.values()) == [{False}, {True}], told
