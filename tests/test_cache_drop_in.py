"""The drop-in encoder with a cache: its gradients, its copies, and where it computes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from test_cache_diffusers import IDS, MASK, folder, make, store

from nai_t5_core.diffusers import cached_drop_in
from nai_t5_core.diffusers.adapter import replace_text_encoder
from nai_t5_core.diffusers.cached_drop_in import CachedT5EncoderModel, lazy_text_encoder
from nai_t5_core.prompts.cache.loaded_settings import SettingsOfStack
from nai_t5_core.prompts.cache.store import Store

pytestmark = pytest.mark.filterwarnings("ignore")
__all__ = ["folder", "store"]  # fixtures


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_copies_encode_without_the_cache(twin: Any, is_loaded: bool, folder: Path, store: Store) -> None:
    lazy = lazy_text_encoder(folder, cache=store)
    if is_loaded:
        assert lazy.stack
    with torch.no_grad():
        again = twin(lazy)
        torch.testing.assert_close(again(IDS, MASK)[0], lazy(IDS, MASK)[0])
    assert len(store.memory) == 2


@pytest.mark.slow
def test_copies_and_calls_load_without_assertions(folder: Path) -> None:
    code = (
        "import copy, sys, torch; from nai_t5_core.diffusers.cached_drop_in import lazy_text_encoder\n"
        "from nai_t5_core import Store\n"
        "one, two = (lazy_text_encoder(sys.argv[1], cache=Store(None)) for _ in range(2))\n"
        "print(copy.deepcopy(one).is_loaded, two(torch.tensor([[5, 1]])).last_hidden_state.shape[1])\n"
    )
    run = subprocess.run([sys.executable, "-O", "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert run.stdout == "True 2\n", run.stderr


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("is_loaded", [True, False])
def test_gradients_come_where_they_are_recorded(is_training: bool, is_loaded: bool, folder: Path, store: Store) -> None:
    """Also of what is kept already."""
    with torch.no_grad():
        expected = lazy_text_encoder(folder, cache=store)(IDS, MASK)[0]
    lazy = lazy_text_encoder(folder, cache=store).train(is_training)
    if is_loaded:
        assert lazy.stack
    for _ in range(2):
        found = lazy(IDS, MASK)[0]
        found.sum().backward()
        torch.testing.assert_close(found, expected)
    assert lazy.shared.weight.grad is not None and store.counts.hits == 0


@pytest.mark.parametrize("is_loaded", [True, False])
def test_weights_without_gradients_are_served(is_loaded: bool, folder: Path, store: Store) -> None:
    for turn in range(2):
        lazy = lazy_text_encoder(folder, cache=store)
        if is_loaded:
            assert lazy.stack
        lazy.requires_grad_(False)
        assert not lazy(IDS, MASK)[0].requires_grad
        assert store.counts.hits == 2 * turn
        assert lazy.is_loaded or turn
        assert not any(parameter.requires_grad for parameter in lazy.stack.parameters())


@pytest.mark.parametrize("is_brought", [True, False])
def test_what_is_brought_for_a_call_is_kept_under_where_it_was_computed(
    is_brought: bool, folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another device, as far as ids without values tell; weights rest on the CPU."""
    lazy, asked, seen = lazy_text_encoder(folder, cache=store), [], []

    def settings_at(dtype: torch.dtype, device: torch.device) -> Any:
        asked.append(device.type)
        return object()

    lazy.keep_in(store, settings_at)
    assert lazy.stack
    lazy._is_brought = is_brought

    def through_cache(_: Any, settings_now: Any, *others: Any) -> Any:
        seen.extend((settings_now(), others[-1].type))
        return torch.zeros(1)

    monkeypatch.setattr(cached_drop_in, "through_cache", through_cache)
    monkeypatch.setattr(SettingsOfStack, "_settings_with", lambda self, at_load, done: at_load)
    with torch.no_grad():
        lazy(IDS.to("meta"), MASK.to("meta"))
    place = "meta" if is_brought else "cpu"
    assert asked[-1] == seen[1] == place


@pytest.mark.parametrize("is_loaded", [True, False])
def test_what_cannot_keep_refuses_a_store(is_loaded: bool, folder: Path, store: Store) -> None:
    """A copy, and an encoder that was loaded without a cache; a pipeline with it is left as it is."""
    lazy = lazy_text_encoder(folder, cache=store)
    if is_loaded:
        assert lazy.stack
    for one in (copy.deepcopy(lazy), CachedT5EncoderModel.from_pretrained(folder)):
        assert not one.can_keep
        with pytest.raises(ValueError, match=r"has no cache: it is a copy, .* make it by lazy_text_encoder"):
            one.use_store(store)
        toy = make("pixart-sigma")
        setattr(toy.pipe, toy.component, one)
        with pytest.raises(ValueError, match="is ours already, and has none"):
            replace_text_encoder(toy.pipe, cache=store)
        with torch.no_grad():
            assert one(IDS, MASK)[0].isfinite().all()
