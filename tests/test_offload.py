"""Encoders whose layers rest in the host's memory: their numbers, after every change, and what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import encoder_part
from conftest import TOY_CONFIGS, build_stack, random_state
from offload_toys import CONFIG, IDS, MASK, WIDE, largest_layer, offloaded, resident
from safetensors.torch import load_file, save_file
from simulated_device import SimulatedDevice
from torch import nn
from toy_loras import toy_lora
from toy_quantised import READ, quantised, write_quantised

from nai_t5_core.backends.choose import encode_on_cuda, prepack, quantize_int8, run_quantised, why_not_prepack
from nai_t5_core.backends.compiled import compile_stack
from nai_t5_core.backends.offload.offload import Offload, offload_layers
from nai_t5_core.backends.offload.weights import replace_parameters, weights_of
from nai_t5_core.float16.guard import ScaleTightenedWarning, guard
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.lora.loras import Loras
from nai_t5_core.model.encoder import Layout
from nai_t5_core.model.packing import PADDING_POLICIES
from nai_t5_core.model.turns import Turns
from nai_t5_core.weights.load import load_encoder


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", TOY_CONFIGS)
@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_is_what_it_is_of_a_resident_one(kind: str, layout: Layout, dtype: torch.dtype) -> None:
    config = TOY_CONFIGS[kind].encoder_only()
    stack = resident(config, dtype, layout)
    dense = MASK[:, None] * MASK[:, :, None]
    embeds = stack.embed(IDS).to(dtype)
    calls: list[Callable[[], Any]] = [lambda p=p: stack(IDS, MASK, padding=p, extra_pad=0) for p in PADDING_POLICIES]
    calls += [lambda: stack(IDS), lambda: stack(IDS, dense), lambda: stack(inputs_embeds=embeds)]
    calls += [lambda: torch.stack(stack.hidden_states(IDS, MASK)[:-1]), lambda: stack.hidden_states(IDS)[-1]]
    expected = [call() for call in calls]
    device = SimulatedDevice()
    offloaded(stack, device)
    with device:
        for _ in range(2):
            assert all(torch.equal(call(), before) for call, before in zip(calls, expected, strict=True))


@pytest.mark.parametrize("kind", READ)
def test_quantised_bytes_come_as_they_lie(kind: str, tmp_path: Path) -> None:
    state = quantised(encoder_part(random_state(WIDE)), READ[kind][1])
    stack = load_encoder(write_quantised(tmp_path / "t5.safetensors", state), "float32", "cpu")
    for block in stack.encoder.block:
        block.runner = None
    expected = stack(IDS, MASK)
    kept = sum(weight.nbytes for block in stack.encoder.block for weight in weights_of(block))
    device = SimulatedDevice()
    offloaded(stack, device)
    with device:
        stack(IDS, MASK)
        device.copies.clear()
        assert torch.equal(stack(IDS, MASK), expected)
    assert [len(pieces) for pieces in device.copies] == [1] * len(stack.encoder.block)
    assert kept <= sum(sum(pieces) for pieces in device.copies) < kept * 1.1 + 256 * 20 * len(stack.encoder.block)


def dense(stack: Any, layer: int) -> Any:
    return stack.encoder.block[layer].layer[1].DenseReluDense


def written_to(stack: Any) -> None:
    for layer in range(3):
        dense(stack, layer).wo.weight.mul_(layer + 2)
    stack.shared.weight.neg_()
    stack.encoder.final_layer_norm.weight.mul_(3)
    stack.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(-1)


def replaced(stack: Any) -> None:
    for layer in range(3):
        dense(stack, layer).wo.weight = nn.Parameter(dense(stack, layer).wo.weight.flip(0))
    dense(stack, 1).wi.weight = nn.Parameter(dense(stack, 1).wi.weight.t().contiguous().t())


def loaded(stack: Any) -> None:
    other = build_stack(CONFIG, random_state(CONFIG, seed=3))
    stack.load_state_dict(other.state_dict())


def loaded_by_assigning(stack: Any) -> None:
    stack.load_state_dict(build_stack(CONFIG, random_state(CONFIG, seed=3)).state_dict(), assign=True)


def merged(stack: Any) -> None:
    Loras(stack).add(toy_lora(CONFIG), 0.7, "style")


def merged_and_out_again(stack: Any) -> None:
    loras = Loras(stack)
    loras.add(toy_lora(CONFIG), 0.7, "style")
    stack(IDS)
    loras.remove("style")


def live(stack: Any) -> None:
    LiveLoras(stack).add(toy_lora(CONFIG), 0.7, "style")


CHANGES = (written_to, replaced, loaded, loaded_by_assigning, merged, merged_and_out_again, live)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen_at_once(change: Any) -> None:
    stack, twin, device = resident(), resident(), SimulatedDevice()
    offloaded(stack, device)
    with device:
        before = stack(IDS, MASK)
        change(stack)
        with torch.utils._python_dispatch._disable_current_modes():
            change(twin)
            expected = twin(IDS, MASK)
        assert torch.equal(expected, before) == (change is merged_and_out_again)
        for _ in range(2):
            assert torch.equal(stack(IDS, MASK), expected)
        device.copies.clear()
        stack(IDS, MASK)
    pieces = [len(each) for each in device.copies]
    assert len(pieces) == 3
    if change in (written_to, loaded, merged_and_out_again, live):
        assert pieces == [1, 1, 1], "what lies together comes together"
    assert all(device.is_locked(weight) for block in stack.encoder.block for weight in weights_of(block))


@pytest.mark.parametrize("layout", ["fused", "separate"])
def test_float16_that_overflows_is_mended(layout: Layout) -> None:
    state = random_state(CONFIG)
    state["encoder.block.1.layer.1.DenseReluDense.wo.weight"] *= 5e4
    exact = build_stack(CONFIG, state, torch.float64)(IDS, MASK)
    stack, device = build_stack(CONFIG, state, torch.float16, layout), SimulatedDevice()
    stack.guard = guard
    offloaded(stack, device)
    with pytest.warns(ScaleTightenedWarning, match="layer 1"), device:
        found = stack(IDS, MASK)
    assert float((found.double() - exact).norm() / exact.norm()) < 5e-3
    with device:
        assert torch.equal(stack(IDS, MASK), found)


def test_it_goes_back_and_forth_and_keeps_its_weights() -> None:
    stack, device = resident(), SimulatedDevice()
    expected = stack(IDS, MASK)
    before = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    offload: Any = offloaded(stack, device).offload
    assert offload.device is not None and "brought to" in repr(stack)
    for _ in range(2):
        stack.to("cpu")
        assert offload.device is None and torch.equal(stack(IDS, MASK), expected)
        offload.start(stack, device)
        with device:
            assert torch.equal(stack(IDS, MASK), expected)
    after = stack.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_copying_pickling_and_saving(tmp_path: Path) -> None:
    stack, device = resident(), SimulatedDevice()
    expected = stack(IDS, MASK)
    offload: Any = offloaded(stack, device).offload
    offload._make_mover = make_simulated
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        other.encoder.block[0].layer[1].DenseReluDense.wo.weight.add_(1)
        assert not torch.equal(other(IDS, MASK), expected)
        other.encoder.block[0].layer[1].DenseReluDense.wo.weight.sub_(1)
        torch.testing.assert_close(other(IDS, MASK), expected, rtol=1e-4, atol=1e-4)
        assert other.offload is not offload
    with device:
        assert torch.equal(stack(IDS, MASK), expected)
    save_file(stack.state_dict(), tmp_path / "saved.safetensors")
    twin = resident()
    twin.load_state_dict(load_file(tmp_path / "saved.safetensors"))
    assert torch.equal(twin(IDS, MASK), expected)


def make_simulated(device: torch.device) -> SimulatedDevice:
    return SimulatedDevice()


def test_all_is_freed_with_the_stack() -> None:
    stack, device = resident(), SimulatedDevice()
    offload: Any = offloaded(stack, device).offload
    stack(IDS)
    slots = [weakref.ref(slot.memory) for slot in offload.ring._slots]
    gone = weakref.ref(stack)
    del stack, offload
    gc.collect()
    assert gone() is None and all(slot() is None for slot in slots)


def test_gradients_are_refused() -> None:
    stack = offloaded(resident(), SimulatedDevice())
    with torch.enable_grad():
        assert not stack(IDS).requires_grad
        with pytest.raises(ValueError, match="computes no gradients"):
            stack(inputs_embeds=torch.zeros(1, 2, CONFIG.d_model, requires_grad=True))
        stack.requires_grad_(True)
        with pytest.raises(ValueError, match="computes no gradients"):
            stack(IDS)


@pytest.mark.parametrize("change", [lambda s: s.half(), lambda s: s.to("meta"), lambda s: s.to(torch.float64)])
def test_what_is_no_move_is_refused_before_anything_changes(change: Any) -> None:
    stack, device = resident(), SimulatedDevice()
    expected = stack(IDS)
    offloaded(stack, device)
    with pytest.raises(ValueError, match="load it anew in that dtype"):
        change(stack)
    assert torch.equal(stack(IDS), expected) and stack.dtype == torch.float32


def test_what_is_packed_is_refused() -> None:
    stack = resident()
    if why_not_prepack(stack) is not None:
        pytest.skip("nothing prepacks here")
    with pytest.raises(ValueError, match="prepacked or quantised for the CPU"):
        offload_layers(prepack(stack))
    assert stack.offload is None


def test_what_is_compiled_is_refused() -> None:
    stack = resident()
    stack.runner = SimpleNamespace(name="flex, compiled")  # type: ignore[assignment]
    with pytest.raises(ValueError, match="computed as a whole"):
        offload_layers(stack)
    assert stack.offload is None


@pytest.mark.parametrize("change", [prepack, quantize_int8, compile_stack, partial(run_quantised, products="kernels")])
def test_nothing_else_computes_its_blocks(change: Any) -> None:
    """Else the blocks would no longer be brought, and the encoder would still say that it is offloaded."""
    stack, device = resident(), SimulatedDevice()
    expected = stack(IDS)
    for made in (offload_layers(stack), offloaded(stack, device)):
        runners = [block.runner for block in made.encoder.block]
        with pytest.raises(ValueError, match="layers are offloaded, and it cannot be"):
            change(made)
        assert [block.runner for block in made.encoder.block] == runners
        assert torch.equal(made(IDS), expected)


@pytest.mark.parametrize("device", ["meta", "mps"])
def test_a_device_that_is_none_of_these_is_refused_before_anything_changes(device: str) -> None:
    stack = resident()
    with pytest.raises(ValueError, match=f"offloaded to {device}"):
        offload_layers(stack, device)
    assert stack.offload is None and type(stack.turns) is Turns


def test_memory_that_is_not_locked_leaves_it_where_it_is() -> None:
    stack = resident()
    expected, offload = stack(IDS), offload_layers(stack).offload
    device = SimulatedDevice(room=largest_layer(stack) * 2)
    assert offload is not None
    with pytest.raises(MemoryError, match="no room"):
        offload.start(stack, device)  # type: ignore[attr-defined]
    assert offload.device is None and stack.device.type == "cpu" and device.buffers == []
    assert torch.equal(stack(IDS), expected)


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("fault", ["lock", "place", "rest"])
def test_what_fails_midway_leaves_nothing_locked(
    fault: str, kind: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stack = resident()
    if kind is not None:
        state = quantised(encoder_part(random_state(WIDE)), READ[kind][1])
        stack = load_encoder(write_quantised(tmp_path / "t5.safetensors", state), "float32", "cpu")
        for block in stack.encoder.block:
            block.runner = None
    expected, device = stack(IDS), SimulatedDevice()
    offload: Any = offload_layers(stack).offload

    def fail(*_: Any) -> Any:
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        if fault == "lock":
            device.room = largest_layer(stack) * 2
        elif fault == "place":
            patch.setattr(device, "buffer", fail)
        else:
            # The last norm is what is moved last.
            patch.setattr("nai_t5_core.backends.offload.offload.replace_parameters", failing_once(replace_parameters))
        with pytest.raises(MemoryError, match="no "):
            offload.start(stack, device)
    assert offload.device is None and stack.device.type == "cpu" and stack.runner is None
    assert device._locked == {} and torch.equal(stack(IDS), expected)
    with pytest.raises(AssertionError):
        _ = offload.ring
    device.room = None
    offload.start(stack, device)
    with device:
        assert torch.equal(stack(IDS), expected)
    assert all(device.is_locked(weight) for block in stack.encoder.block for weight in weights_of(block))


def failing_once(call: Any) -> Any:
    calls = iter(range(1000))

    def failing(*given: Any) -> None:
        if next(calls) == 9:
            raise MemoryError("no more")
        call(*given)

    return failing


def test_an_encoder_that_cannot_be_offloaded_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = resident()
    stack.requires_grad_(True)
    stack.shared.requires_grad_(False)
    expected, runners, turns = stack(IDS), [block.runner for block in stack.encoder.block], stack.turns
    makes = partial(SimulatedDevice, room=largest_layer(stack) * 2)
    monkeypatch.setattr(Offload, "move", lambda self, stack, change: self.start(stack, makes()))
    with pytest.raises(MemoryError, match="no room"):
        offload_layers(stack)
    assert stack.offload is None and stack.turns is turns and torch.equal(stack(IDS), expected)
    assert [block.runner for block in stack.encoder.block] == runners
    assert [name for name, weight in stack.named_parameters() if not weight.requires_grad] == ["shared.weight"]


def test_two_ways_to_offload_exclude_each_other() -> None:
    accelerate = pytest.importorskip("accelerate")
    stack = resident()
    expected = stack(IDS)
    offload: Any = offload_layers(stack).offload
    # At rest it is a model like any other.
    accelerate.cpu_offload(stack, torch.device("cpu"))
    assert torch.equal(stack(IDS), expected)
    with pytest.raises(ValueError, match="use one of the two"):
        offload.start(stack, SimulatedDevice())
    accelerate.hooks.remove_hook_from_module(stack, recurse=True)
    offload.start(stack, SimulatedDevice())
    assert torch.equal(stack(IDS), expected)


def test_the_automatic_choice_leaves_it_alone() -> None:
    stack = offloaded(resident(), SimulatedDevice())
    runner = stack.runner
    assert encode_on_cuda(stack).runner is runner
