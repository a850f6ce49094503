"""Pipelines whose T5 stays in the host's memory: by our own offloading of layers, and by diffusers' of groups."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.hooks import apply_group_offloading
from simulated_device import SimulatedDevice
from test_diffusers_families import assert_same
from toy_offloading import CPU, OFFLOADS, cpu_has_one_name, hooks_of
from toy_pipelines import Toy, make, text_encoder

from nai_t5_core.backends.offload.offload import Offload
from nai_t5_core.diffusers.adapter import replace_text_encoder, restore_text_encoder
from nai_t5_core.diffusers.cached_drop_in import lazy_text_encoder
from nai_t5_core.hf import NAIT5EncoderModel

__all__ = ["cpu_has_one_name"]

IDS = torch.arange(2, 14).reshape(2, 6)


@pytest.fixture(params=["pixart-sigma", "wan", "flux"])
def toy(request: pytest.FixtureRequest) -> Toy:
    return make(request.param)


def bring(model: NAIT5EncoderModel) -> SimulatedDevice:
    """Has a model compute on a device that is simulated."""
    device = SimulatedDevice()
    offload: Any = model.stack.offload
    offload.start(model.stack, device)
    return device


def test_a_pipeline_runs_with_a_t5_that_is_offloaded(toy: Toy) -> None:
    image = toy.run()
    replace_text_encoder(toy.pipe, offload=True)
    assert "offloaded layer by layer" in repr(toy.encoder)
    assert_same(toy.run(), image, 1e-4)
    with bring(toy.encoder) as device:
        assert_same(toy.run(), image, 1e-4)
    assert device.copies and all(len(pieces) == 1 for pieces in device.copies)
    assert toy.encoder.device == toy.encoder.stack.device == CPU
    toy.pipe.to("cpu")
    assert_same(toy.run(), image, 1e-4)
    restore_text_encoder(toy.pipe)
    assert not isinstance(toy.encoder, NAIT5EncoderModel)
    assert_same(toy.run(), image, 1e-4)


def test_restoring_one_that_computes_on_a_device(toy: Toy) -> None:
    image = toy.run()
    replace_text_encoder(toy.pipe)
    replace_text_encoder(toy.pipe, offload=True)  # where ours is there already
    bring(toy.encoder)
    restore_text_encoder(toy.pipe)
    assert_same(toy.run(), image, 1e-4)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_the_pipelines_own_offloading_finds_it_at_rest(toy: Toy, offload: Any) -> None:
    image = toy.run()
    replace_text_encoder(toy.pipe, offload=True)
    offload(toy.pipe)
    assert hooks_of(toy.encoder)
    for _ in range(2):
        assert_same(toy.run(), image, 1e-4)


@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_saving_copies_and_loading(padding: Any, tmp_path: Path) -> None:
    plain = NAIT5EncoderModel.from_hf(text_encoder())
    model = NAIT5EncoderModel.from_hf(text_encoder(), offload=True)
    plain.padding = model.padding = padding
    bring(model)
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    expected = plain(IDS, mask).last_hidden_state.detach()
    torch.testing.assert_close(model(IDS, mask).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    for form in ("native", "transformers"):
        model.save_pretrained(tmp_path / form, save_format=form)
        for offload in (False, True):
            other = NAIT5EncoderModel.from_pretrained(tmp_path / form, device_map="cpu", offload=offload)
            other.padding = padding
            found = other(IDS, mask).last_hidden_state.detach()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_that_is_loaded_late_is_offloaded_when_it_is(tmp_path: Path) -> None:
    plain = NAIT5EncoderModel.from_hf(text_encoder())
    plain.save_pretrained(tmp_path / "t5")
    model = lazy_text_encoder(tmp_path / "t5", cache=tmp_path / "cache", offload=True)
    assert not model.is_loaded
    with torch.no_grad():
        found = model(IDS).last_hidden_state
        torch.testing.assert_close(found, plain(IDS).last_hidden_state, rtol=1e-5, atol=1e-5)
        device = bring(model)
        assert torch.equal(model(IDS).last_hidden_state, found) and device.copies == []
        model(IDS + 1)
    assert device.copies and isinstance(model.stack.offload, Offload)


def test_what_excludes_each_other_is_refused_before_anything_changes(toy: Toy) -> None:
    before = toy.encoder
    with pytest.raises(ValueError, match="offload=True exclude each other"):
        replace_text_encoder(toy.pipe, quantize="int8", offload=True)
    assert toy.encoder is before
    with pytest.raises(ValueError, match="offload=True exclude each other"):
        NAIT5EncoderModel.from_pretrained(None, quantize="int8", offload=True)


# ---------------------------------------------------------------------------------------------------------------------
# Diffusers' own
# ---------------------------------------------------------------------------------------------------------------------

GROUPS: list[dict[str, Any]] = [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}]
GROUPS[1]["num_blocks_per_group"] = 1


@pytest.mark.parametrize("options", GROUPS)
@pytest.mark.parametrize("layout", ["fused", "separate"])
def test_groups_of_blocks_are_read_when_they_are_there(toy: Toy, options: Any, layout: Any, tmp_path: Path) -> None:
    """From disk, so that between calls the weights are memory without values: a weight read out of turn is noticed."""
    image = toy.run()
    replace_text_encoder(toy.pipe, layout=layout)
    apply_group_offloading(toy.encoder, CPU, CPU, offload_to_disk_path=str(tmp_path), **options)
    blocks = toy.encoder.encoder.block
    groups = {id(block._diffusers_hook.hooks["group_offloading"].group) for block in blocks if block_is_group(block)}
    assert len(groups) == (len(blocks) if options["offload_type"] == "block_level" else 0)
    with torch.no_grad():
        for parameter in toy.encoder.parameters():
            parameter.fill_(torch.nan)
    for _ in range(2):
        assert_same(toy.run(), image, 1e-4)


def block_is_group(block: Any) -> bool:
    return hasattr(block, "_diffusers_hook") and "group_offloading" in block._diffusers_hook.hooks


class StreamsOfTheCpu:
    """What diffusers asks of a device that copies on a stream, by which nothing is copied here."""

    def __init__(self, *_: Any) -> None: ...

    Stream = SimpleNamespace

    def stream(self, stream: Any) -> Any:
        return nullcontext()

    def current_stream(self) -> Any:
        return SimpleNamespace(synchronize=lambda: None)

    def synchronize(self, *_: Any) -> None: ...


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("options", GROUPS)
def test_groups_on_a_stream_are_brought_in_their_order(
    options: Any, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second call on each group brings the next one, in the order that the first call had."""
    groups = pytest.importorskip("diffusers.hooks.group_offloading")
    if not hasattr(groups, "TorchDeviceBackend"):
        pytest.skip("this diffusers asks torch itself for streams")
    model = NAIT5EncoderModel.from_hf(text_encoder(), layout=layout)
    expected = model(IDS).last_hidden_state
    monkeypatch.setattr(groups, "TorchDeviceBackend", StreamsOfTheCpu)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda *_: True)
    kind = groups.GroupOffloadingType(options["offload_type"])
    config = groups.GroupOffloadingConfig(
        *(CPU, CPU, kind),
        non_blocking=False,
        record_stream=False,
        low_cpu_mem_usage=True,
        num_blocks_per_group=1,
        stream=SimpleNamespace(synchronize=lambda: None),
        block_modules=model._group_offload_block_modules,
    )
    groups._apply_group_offloading(model, config)
    for _ in range(3):
        torch.testing.assert_close(model(IDS).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    if options["offload_type"] == "block_level":
        in_order = [*model.encoder.block, model.encoder.final_layer_norm]
        hooks = [each._diffusers_hook.hooks["group_offloading"] for each in in_order]
        assert [hook.next_group for hook in hooks] == [*(hook.group for hook in hooks[1:]), None]


@pytest.mark.parametrize("options", GROUPS)
def test_hidden_states_of_groups(options: Any) -> None:
    model = NAIT5EncoderModel.from_hf(text_encoder())
    expected = model(IDS, output_hidden_states=True).hidden_states
    apply_group_offloading(model, CPU, CPU, **options)
    found = model(IDS, output_hidden_states=True).hidden_states
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, expected, strict=True))
