"""A pipeline's T5 with a cache, loaded late or not at all: pictures are what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from test_diffusers_families import assert_same
from torch.multiprocessing.reductions import StorageWeakRef
from toy_loras import toy_lora
from toy_offloading import CPU, OFFLOADS, cpu_has_one_name, offload_model
from toy_pipelines import Toy
from toy_pipelines import make as make_anew

from nai_t5_core import hf
from nai_t5_core.diffusers import cached_drop_in
from nai_t5_core.diffusers.adapter import replace_text_encoder, restore_text_encoder
from nai_t5_core.diffusers.cached_drop_in import CachedT5EncoderModel, lazy_text_encoder
from nai_t5_core.diffusers.encode_prompt import encode_prompt
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.prompts.cache.store import Store
from nai_t5_core.weights.formats import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")
__all__ = ["cpu_has_one_name"]  # a fixture for every test here

IDS = torch.tensor([[5, 17, 3, 1, 0, 0], [9, 1, 0, 0, 0, 0]])
MASK = (IDS != 0).long()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each encoder that was loaded."""
    found: list[str] = []
    really = cached_drop_in.assemble

    def counted(examination: Any, *rest: Any) -> Any:
        found.append(examination.checkpoint.source)
        return really(examination, *rest)

    monkeypatch.setattr(cached_drop_in, "assemble", counted)
    return found


def make(name: str) -> Toy:
    """The same pipeline every time."""
    torch.manual_seed(7)
    return make_anew(name)


def saved(toy: Toy, folder: Path) -> Path:
    """The toy's T5 as a folder of its own."""
    toy.encoder.save_pretrained(folder)
    return folder


def with_lazy(name: str, store: Any, folder: Path, **options: Any) -> Toy:
    """A toy pipeline whose T5 is to be loaded late."""
    toy = make(name)
    setattr(toy.pipe, toy.component, lazy_text_encoder(saved(toy, folder), cache=store, **options))
    return toy


@pytest.mark.parametrize("name", ["flux", "wan", "pixart-sigma", "sd3"])
def test_a_pipeline_runs_without_its_t5(name: str, tmp_path: Path, store: Store, loads: list[str]) -> None:
    expected = make(name).run()
    for turn in range(2):
        toy = with_lazy(name, store, tmp_path / "t5")
        replace_text_encoder(toy.pipe)  # which gives it the family's padding
        assert not toy.encoder.is_loaded
        assert_same(toy.run(), expected, 1e-4)
        assert toy.encoder.is_loaded == (turn == 0)
    assert len(loads) == 1


def test_a_pipeline_is_made_without_its_t5(tmp_path: Path, store: Store, loads: list[str]) -> None:
    toy = make("pixart-sigma")
    expected = toy.run()
    toy.pipe.save_pretrained(tmp_path / "pipe")
    for _ in range(2):
        lazy = lazy_text_encoder(tmp_path / "pipe", subfolder="text_encoder", cache=store)
        toy.pipe = type(toy.pipe).from_pretrained(tmp_path / "pipe", text_encoder=lazy)
        assert toy.pipe.text_encoder is lazy and not lazy.is_loaded
        assert_same(toy.run(), expected, 1e-4)
    assert len(loads) == 1 and not lazy.is_loaded


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_before_it_is_loaded(offload: Any, tmp_path: Path, store: Store, loads: list[str]) -> None:
    expected = make("pixart-sigma").run()
    for _ in range(2):
        toy = with_lazy("pixart-sigma", store, tmp_path / "t5")
        offload(toy.pipe)
        assert_same(toy.run(), expected, 1e-4)
        assert_same(toy.run(), expected, 1e-4)
    assert len(loads) == 1 and not toy.encoder.is_loaded


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_after_it_was_loaded(offload: Any, tmp_path: Path, store: Store) -> None:
    toy = with_lazy("pixart-sigma", store, tmp_path / "t5")
    expected = toy.run()
    assert toy.encoder.is_loaded
    offload(toy.pipe)
    for _ in range(2):
        assert_same(toy.run(), expected, 1e-4)


def test_offloading_as_a_whole_keeps_the_cache(tmp_path: Path, store: Store) -> None:
    """The weights are moved at every call."""
    toy = with_lazy("pixart-sigma", store, tmp_path / "t5")
    offload_model(toy.pipe)
    toy.run()
    hits = store.counts.hits
    assert_same(toy.run(), make("pixart-sigma").run(), 1e-4)
    assert store.counts.hits > hits


@pytest.mark.parametrize("name", ["pixart-sigma", "flux"])
def test_replaced_with_a_cache_and_restored(name: str, store: Store) -> None:
    toy = make(name)
    old, expected = toy.encoder, toy.run()
    replace_text_encoder(toy.pipe, cache=store)
    assert isinstance(toy.encoder, CachedT5EncoderModel) and toy.encoder.is_loaded
    for _ in range(2):
        assert_same(toy.run(), expected, 1e-4)
    assert store.counts.hits > 0
    restore_text_encoder(toy.pipe)
    assert toy.encoder is old
    assert_same(toy.run(), expected, 1e-4)


@pytest.mark.parametrize("cache", [False, True])
def test_the_weights_of_the_old_encoder_are_let_go(cache: bool, store: Store) -> None:
    """In a dtype in which no matrix is shared."""
    toy = make("pixart-sigma")
    matrices = [parameter for parameter in toy.encoder.parameters() if parameter.ndim == 2]
    memory = [StorageWeakRef(matrix.untyped_storage()) for matrix in matrices]
    del matrices
    replace_text_encoder(toy.pipe, dtype=torch.float64, cache=store if cache else False)
    assert len(memory) > 10 and all(storage.expired() for storage in memory)


def test_the_replaced_and_the_lazy_share_what_is_kept(tmp_path: Path, store: Store) -> None:
    toy = make("pixart-sigma")
    folder = saved(toy, tmp_path / "t5")
    replace_text_encoder(toy.pipe, cache=store)
    with torch.no_grad():
        expected = toy.encoder(IDS, MASK)[0]
        lazy = lazy_text_encoder(folder, cache=store)
        lazy.padding = toy.encoder.padding
        assert torch.equal(lazy(IDS, MASK)[0][0, :4], expected[0, :4])
    assert not lazy.is_loaded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(make("pixart-sigma"), tmp_path / "t5")


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("padding", ["exact", "skip", "trim", "attend"])
def test_a_call_is_that_of_the_plain_class(with_mask: bool, padding: Any, folder: Path, store: Store) -> None:
    plain, mask = hf.NAIT5EncoderModel.from_pretrained(folder), MASK if with_mask else None
    plain.padding = padding
    for turn in range(2):
        lazy = lazy_text_encoder(folder, cache=store)
        lazy.padding = padding
        with torch.no_grad():
            found, expected = (model(IDS, mask).last_hidden_state for model in (lazy, plain))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert lazy.is_loaded == (turn == 0)


@pytest.mark.parametrize(
    ("ids", "mask", "options"),
    [
        (IDS, MASK.flip(1), {}),  # pads first
        (IDS, torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]), {}),  # a hole
        (IDS, torch.zeros_like(IDS), {}),
        (IDS, MASK[:, None, :].expand(-1, 6, -1), {}),
        (IDS, MASK, {"output_hidden_states": True}),
    ],
    ids=["pads first", "hole", "no tokens", "3 dimensions", "hidden states"],
)
def test_what_is_no_prompt_with_pads_behind_it_is_encoded(
    ids: Any, mask: Any, options: dict[str, Any], folder: Path, store: Store
) -> None:
    plain, lazy = hf.NAIT5EncoderModel.from_pretrained(folder), lazy_text_encoder(folder, cache=store)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(lazy(ids, mask, **options)[0], plain(ids, mask, **options)[0])
    assert store.counts.hits == len(store.memory) == 0


@pytest.mark.parametrize(("padding", "extra_pad"), [("exact", 0), ("skip", 2), ("trim", 2), ("skip", 0), ("attend", 0)])
@pytest.mark.parametrize("together", [True, False])
def test_pads_may_be_any_tokens(padding: Any, extra_pad: int, together: bool, folder: Path, store: Store) -> None:
    """Their hidden states are computed of them, in one batch and in one after the other."""
    plain, lazy = hf.NAIT5EncoderModel.from_pretrained(folder), lazy_text_encoder(folder, cache=store)
    for model in (plain, lazy):
        model.padding, model.extra_pad = padding, extra_pad
    ids = torch.tensor([[9, 1, *pads] for pads in ((0, 0, 0), (7, 7, 7), (7, 8, 7), (3, 3, 3))])
    mask = torch.tensor([[1, 1, 0, 0, 0]]).expand(4, -1)
    with torch.no_grad():
        for _ in range(2):
            for some in [ids] if together else ids.split(1):
                found, expected = (model(some, mask[: len(some)])[0] for model in (lazy, plain))
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert store.counts.hits > 0


def test_faults_of_a_call_are_told_as_ever(folder: Path, store: Store) -> None:
    lazy = lazy_text_encoder(folder, cache=store)
    with pytest.raises(ValueError, match="mask has shape"):
        lazy(IDS, MASK[:, :3])
    with pytest.raises(ValueError, match="vocab"):
        lazy(IDS + 10_000_000, MASK)


def test_before_it_is_loaded_it_moves_and_casts_and_tells_so(folder: Path, store: Store) -> None:
    lazy = lazy_text_encoder(folder, cache=store)
    assert (lazy.dtype, lazy.device) == (torch.float32, CPU)
    lazy.to(torch.bfloat16)
    assert lazy.dtype == torch.bfloat16 and "not loaded, torch.bfloat16" in repr(lazy)
    assert lazy.to("meta").device.type == "meta"
    lazy.to_empty(device="cpu")
    assert not lazy.is_loaded and lazy.num_parameters() == 0
    with torch.no_grad():
        assert lazy(IDS, MASK)[0].dtype == torch.bfloat16
    assert lazy.is_loaded and lazy.stack.dtype == torch.bfloat16
    half = lazy_text_encoder(folder, cache=store, dtype="bfloat16")
    with torch.no_grad():
        half(IDS, MASK)
    assert not half.is_loaded  # cast before loading is loaded so


def test_what_needs_the_weights_loads_them(folder: Path, store: Store, tmp_path: Path) -> None:
    plain = hf.NAIT5EncoderModel.from_pretrained(folder)
    for use in (
        lambda model: model.get_input_embeddings(),
        lambda model: model.encoder,
        lambda model: model.save_pretrained(tmp_path / "again"),
    ):
        lazy = lazy_text_encoder(folder, cache=store)
        use(lazy)
        assert lazy.is_loaded
    assert lazy.state_dict().keys() == plain.state_dict().keys()
    again = hf.NAIT5EncoderModel.from_pretrained(tmp_path / "again")
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_live_loras_are_in_the_key(folder: Path, store: Store) -> None:
    plain, lazy = hf.NAIT5EncoderModel.from_pretrained(folder), lazy_text_encoder(folder, cache=store)
    sets = [LiveLoras(plain), LiveLoras(lazy)]
    lora = toy_lora(plain.stack.config)
    with torch.no_grad():
        for strength in (0.5, 1.0, 0.5):
            for loras in sets:
                loras.clear()
                loras.add(lora, strength)
            torch.testing.assert_close(lazy(IDS, MASK)[0], plain(IDS, MASK)[0])
    assert store.counts.hits == 2


def test_textual_inversion_by_others_ends_the_cache(folder: Path, store: Store) -> None:
    lazy = lazy_text_encoder(folder, cache=store)
    with torch.no_grad():
        before = lazy(IDS, MASK)[0]
        lazy.get_input_embeddings().weight[17] += 1
        assert not torch.allclose(lazy(IDS, MASK)[0], before)


def test_word_weights_and_chunks_go_through_it(tmp_path: Path, store: Store) -> None:
    def encoded(toy: Toy) -> Any:
        replace_text_encoder(toy.pipe)
        given = encode_prompt(toy.pipe, "a red cat", word_weights={"red": 1.5})
        return given.outputs["prompt_embeds"]

    expected = encoded(make("wan"))
    for turn in range(2):
        toy = with_lazy("wan", store, tmp_path / "t5")
        torch.testing.assert_close(encoded(toy), expected)
        assert toy.encoder.is_loaded == (turn == 0)


def test_a_file_that_was_changed_is_not_loaded(folder: Path, store: Store) -> None:
    lazy = lazy_text_encoder(folder, cache=store)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes())
    with torch.no_grad(), pytest.raises(CheckpointError, match="make the encoder again"):
        lazy(IDS, MASK)


@pytest.mark.parametrize("when", ["hashed", "loaded"])
def test_a_file_that_is_changed_while_it_is_read_is_not_taken(
    when: str, folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"hashed": "settings_for", "loaded": "assemble"}[when]
    really = getattr(cached_drop_in, name)

    def changing(*arguments: Any, **options: Any) -> Any:
        found = really(*arguments, **options)
        monkeypatch.setattr(cached_drop_in, name, really)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes())
        return found

    monkeypatch.setattr(cached_drop_in, name, changing)
    lazy = lazy_text_encoder(folder, cache=store)
    with torch.no_grad(), pytest.raises(CheckpointError, match="make the encoder again"):
        lazy(IDS, MASK)
    assert not lazy.is_loaded and len(store.memory) == 0


def test_what_is_ours_already_has_no_cache_to_be_given(store: Store, tmp_path: Path) -> None:
    toy = make("pixart-sigma")
    replace_text_encoder(toy.pipe)
    with pytest.raises(ValueError, match="is ours already, and has none"):
        replace_text_encoder(toy.pipe, cache=store)
    lazy = with_lazy("pixart-sigma", Store(None), tmp_path / "t5")
    replace_text_encoder(lazy.pipe, cache=store)
    lazy.run()
    assert len(store.memory) > 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"cache": 3}, "cache=3"),
        ({"dtype": "int3"}, "unknown dtype"),
        ({"layout": "round"}, "unknown layout"),
        ({"quantize": "int2"}, "quantize='int2'"),
        ({"subfolder": "nowhere"}, "does not exist"),
        ({"config": {}}, None),
        ({"load_in_8bit": True}, "load_in_8bit"),
    ],
    ids=str,
)
def test_what_loading_refuses_is_refused_at_once(
    options: dict[str, Any], told: str | None, folder: Path, loads: list[str]
) -> None:
    if told is None:
        lazy_text_encoder(folder, cache=Store(None), **options)
    else:
        with pytest.raises(ValueError, match=told):
            lazy_text_encoder(folder, **{"cache": Store(None), **options})
    assert loads == []


def test_a_pipeline_with_it_is_saved_and_made_again(tmp_path: Path, store: Store) -> None:
    toy = with_lazy("pixart-sigma", store, tmp_path / "t5")
    expected = toy.run()
    toy.pipe.save_pretrained(tmp_path / "pipe")
    toy.pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert_same(toy.run(), expected, 1e-4)
