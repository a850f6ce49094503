"""What a quantised file gives is kept under a key that tells apart all that can change it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_toys import KERNELS, conditioning, error, require_comfyui, toy_family, toy_lora
from test_patches import t5_of, with_lora
from test_quantised import EVERYWHERE, PROMPT, load, write_kind, write_mixed

from comfy_nai_t5.choices import Settings
from nai_t5_core.prompts.cache.store import Store

require_comfyui()


@pytest.mark.parametrize("choice", ["auto", "unpack"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "int8, rotated", "NF4", "NVFP4", "float8, by rows", "mixed"])
def test_the_cache(kind: str, choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read at the first prompt that is not kept; LoRAs, kinds and the choice to unpack are told apart."""
    from comfy_nai_t5 import families, late

    monkeypatch.setitem(families.FAMILIES, "mochi", toy_family("mochi"))
    store = Store(tmp_path / "store")
    monkeypatch.setattr(late, "store_for", lambda choice: store)
    monkeypatch.setattr("comfy_nai_t5.clip.store_for", lambda choice: store)
    path = write_mixed(tmp_path) if kind == "mixed" else write_kind(tmp_path, kind)
    expected = conditioning(load(path, monkeypatch, Settings("float32", choice)), PROMPT)

    def loaded(weights: str) -> Any:
        return late.late_t5(path, "mochi", Settings("float32", weights, cache="on"))

    first = loaded(choice)
    lora = toy_lora(t5_of(first), EVERYWHERE, "t5xxl")
    assert torch.equal(conditioning(first, PROMPT)["cond"], expected["cond"])
    patched = conditioning(with_lora(first, lora, 0.5), PROMPT)
    assert error(patched["cond"], expected["cond"]) > 1e-3
    again = loaded(choice)
    for clip, wanted in ((again, expected), (with_lora(again, lora, 0.5), patched)):
        assert torch.equal(conditioning(clip, PROMPT)["cond"], wanted["cond"])
    assert not again.cache.is_loaded and (store.counts.hits, store.counts.misses) == (2, 2)
    other = loaded("unpack" if choice == "auto" else "auto")
    conditioning(other, PROMPT)
    assert other.cache.is_loaded and store.counts.misses == 3
    assert again.load_model() and again.cache.is_loaded
    assert torch.equal(
        conditioning(with_lora(again, lora, -0.5).clone(), PROMPT)["cond"],
        conditioning(with_lora(load(path, monkeypatch, Settings("float32", choice)), lora, -0.5), PROMPT)["cond"],
    )


def test_kinds_are_in_the_hash_of_weights_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes mean other numbers in another kind."""
    from comfy_nai_t5.clip_cache import weights_in_memory
    from comfy_nai_t5.quantised import quantised_modules
    from nai_t5_core.backends.quantised.ggml import GGML_KINDS

    clip = load(write_kind(tmp_path, "Q4_0"), monkeypatch)
    before = weights_in_memory(clip.patcher)
    assert before is not None and before == weights_in_memory(clip.patcher)
    for _, module in quantised_modules(clip.patcher.model):
        module.kind = GGML_KINDS["IQ4_NL"]
    assert weights_in_memory(clip.patcher) not in (None, before)


def key_of_tokens(clip: Any) -> str:
    from comfy_nai_t5.clip_key import key_of

    return key_of(clip, "base", {"t5xxl": clip.cond_stage_model.t5xxl}, clip.tokenize(PROMPT), None).text


@pytest.mark.skipif(not KERNELS, reason="this processor has no kernels")
def test_kernels_are_in_the_key_beside_quantised_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They compute the plain layer, in another order of sums."""
    clip = load(write_mixed(tmp_path), monkeypatch, Settings("bfloat16"))
    by_kernels, key = conditioning(clip, PROMPT)["cond"], key_of_tokens(clip)
    assert key == key_of_tokens(clip)
    monkeypatch.setattr("comfy_nai_t5.fused.better_than_kernels", lambda: "this test")
    assert not torch.equal(conditioning(clip, PROMPT)["cond"], by_kernels)
    assert key_of_tokens(clip) != key


@pytest.mark.skipif(not KERNELS, reason="this processor has no kernels")
def test_what_multiplies_by_quantised_weights_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections by themselves, too, in whatever layout."""
    from comfy_nai_t5.quantised import QuantisedLinear

    clip = load(write_kind(tmp_path, "Q8_0"), monkeypatch, Settings("float32", layout="separate"))
    by_kernels, key = conditioning(clip, PROMPT)["cond"], key_of_tokens(clip)
    for place in ("comfy_nai_t5.clip_key", "nai_t5_core.backends.quantised.single"):
        monkeypatch.setattr(f"{place}.set_to_use", lambda named=None: None)
    for module in t5_of(clip).modules():
        if isinstance(module, QuantisedLinear):
            module.product.forget()
    by_torch = conditioning(clip, PROMPT)["cond"]
    assert not torch.equal(by_torch, by_kernels) and error(by_torch, by_kernels) < 1e-5
    assert key_of_tokens(clip) != key
