"""Encoders whose layers rest in the host's memory: their numbers, and the order of copies and work, simulated."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import encoder_part
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from hf_toys import assert_near
from safetensors.torch import load_file, save_file
from simulated_device import RaceError, SimulatedDevice, Stream
from torch import Tensor, nn
from toy_loras import toy_lora
from toy_quantised import READ, quantised, write_quantised

from nai_t5_core.backends.choose import encode_on_cuda, prepack, why_not_prepack
from nai_t5_core.backends.offload.offload import CPU, Offload, offload_layers
from nai_t5_core.backends.offload.ring import Ring
from nai_t5_core.backends.offload.weights import weights_of
from nai_t5_core.facts.config import T5Config
from nai_t5_core.float16.guard import ScaleTightenedWarning, guard
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.lora.loras import Loras
from nai_t5_core.model.encoder import Layout, T5EncoderStack
from nai_t5_core.model.packing import PADDING_POLICIES
from nai_t5_core.prompts.cache.settings import settings_of
from nai_t5_core.prompts.cache.store import open_store
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.prompts.textual_inversion import add_embeddings
from nai_t5_core.weights.examine import examine
from nai_t5_core.weights.load import load_encoder

CONFIG = TOY_CONFIGS["v1.1"].encoder_only()
EMBEDDED = examine(None).config.encoder_only()
# What every kind can keep.
WIDE = CONFIG.model_copy(update={"d_model": 256, "d_kv": 64, "d_ff": 256})
MASK = padding_mask([0, 3, 11, 4], 11)
IDS = torch.randint(0, 96, MASK.shape, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def of_layers(layers: int, config: T5Config = CONFIG) -> T5Config:
    return config.model_copy(update={"num_layers": layers})


def resident(config: T5Config = CONFIG, dtype: torch.dtype = torch.float32, layout: Layout = "fused") -> T5EncoderStack:
    """Computed by its modules, as an offloaded one is."""
    stack = build_stack(config, random_state(config), dtype, layout)
    for block in stack.encoder.block:
        block.runner = None
    return stack


def offloaded(stack: T5EncoderStack, device: SimulatedDevice) -> T5EncoderStack:
    """The same stack, with a device that is simulated."""
    offload: Any = offload_layers(stack).offload
    offload.start(stack, device)
    return stack


def largest_layer(stack: T5EncoderStack) -> int:
    return max(sum(-(-weight.nbytes // 256) * 256 for weight in weights_of(block)) for block in stack.encoder.block)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Copies and work
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_one_copy_for_each_layer_into_two_places_made_once(layers: int) -> None:
    stack, device = resident(of_layers(layers)), SimulatedDevice()
    expected = stack(IDS, MASK)
    offloaded(stack, device)
    with device:
        for turn in range(4):
            device.copies.clear()
            assert torch.equal(stack(IDS, MASK), expected)
            # The first encode also begins what comes after the last. Two layers stay where they are.
            extra = 2 if turn == 0 else 0
            assert len(device.copies) == (2 * (turn == 0) if layers <= 2 else layers + extra)
            assert all(len(pieces) == 1 for pieces in device.copies)
    assert len(device.buffers) == 2
    assert largest_layer(stack) - 256 < device.buffers[0] == device.buffers[1] <= largest_layer(stack)


def test_copies_are_as_good_as_without_a_pause() -> None:
    """Of work that takes half of what copies take, all but the last layer's is under them."""
    stack, device = resident(of_layers(24)), SimulatedDevice((1.0, 0.5))
    offloaded(stack, device)
    with device:
        stack(IDS)
        device.copies.clear()
        before = device.work.time
        for _ in range(3):
            stack(IDS)
    copying = sum(sum(pieces) for pieces in device.copies)
    assert device.work.time - before < 1.05 * copying


def test_work_that_takes_longer_than_copies_never_waits_for_them() -> None:
    stack, device = resident(of_layers(12)), SimulatedDevice((0.5, 1.0))
    offloaded(stack, device)
    with device:
        stack(IDS)
        device.copies.clear()
        before = device.work.time
        stack(IDS)
    assert device.work.time - before < 1.01 * sum(sum(pieces) for pieces in device.copies)


class WithoutWaiting(SimulatedDevice):
    """Work does not wait for the end of copies."""

    def wait(self, event: Any, memory: Tensor) -> None:
        pass


class WithoutRegard(SimulatedDevice):
    """Copies do not wait for the end of work."""

    def copy(self, pairs: Any, after: Any) -> Any:
        return super().copy(pairs, None)


class TooEarly(SimulatedDevice):
    """The end of work is taken for what it was at first."""

    def worked(self) -> Any:
        self._first = getattr(self, "_first", None) or super().worked()
        return self._first


@pytest.mark.parametrize("faulty", [WithoutWaiting, WithoutRegard, TooEarly])
@pytest.mark.parametrize("layers", [3, 4])
def test_a_missing_event_is_found(faulty: type[SimulatedDevice], layers: int) -> None:
    stack, device = resident(of_layers(layers)), faulty()
    offloaded(stack, device)
    with device, pytest.raises(RaceError):
        for _ in range(2):
            stack(IDS)


def leave_before(self: Ring, slot: Any, index: int) -> None:
    self._bring(slot, (index + 2) % self._count)
    slot.free = self._mover.worked()


def test_a_place_that_is_given_away_too_soon_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ring, "_leave", leave_before)
    stack, device = resident(of_layers(4)), SimulatedDevice()
    offloaded(stack, device)
    with device, pytest.raises(RaceError):
        stack(IDS)


def test_work_on_other_streams_is_waited_for() -> None:
    """Threads of a server may have a stream each."""
    stack, device = resident(of_layers(5)), SimulatedDevice()
    expected = stack(IDS)
    offloaded(stack, device)
    with device:
        for turn in range(6):
            device.work = Stream(f"work {turn}")
            assert torch.equal(stack(IDS), expected)


def test_an_encode_that_breaks_off_leaves_the_order_as_it_was() -> None:
    stack, device = resident(of_layers(5)), SimulatedDevice()
    expected = stack(IDS)
    offloaded(stack, device)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with device:
        stack(IDS)
        for layer in range(5):
            hook = stack.encoder.block[layer].layer[1].DenseReluDense.register_forward_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                stack(IDS)
            hook.remove()
            assert torch.equal(stack(IDS), expected)


def test_threads_take_turns() -> None:
    stack, device = resident(of_layers(4)), SimulatedDevice()
    prompts = [IDS[:, : 3 + number] for number in range(8)]
    expected = [stack(prompt) for prompt in prompts]
    offloaded(stack, device)

    def encode(prompt: Tensor) -> Tensor:
        with torch.no_grad():
            return stack(prompt)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(encode, prompts))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Changes
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


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


def test_memory_that_is_not_locked_leaves_it_where_it_is() -> None:
    stack = resident()
    expected, offload = stack(IDS), offload_layers(stack).offload
    device = SimulatedDevice(room=largest_layer(stack) * 2)
    assert offload is not None
    with pytest.raises(MemoryError, match="no room"):
        offload.start(stack, device)  # type: ignore[attr-defined]
    assert offload.device is None and stack.device.type == "cpu" and device.buffers == []
    assert torch.equal(stack(IDS), expected)


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


# ---------------------------------------------------------------------------------------------------------------------
# What users call
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "the device is cpu; give device='cuda'"),
        ({"device": "cuda", "dtype": "float32", "quantize": "int8"}, "leave one out|on the CPU"),
        ({"device": "cuda", "compile": True}, "offload and compile exclude each other"),
    ],
)
def test_arguments_that_exclude_each_other(options: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nai_t5_core.prompts.choices.resolve_device", torch.device)
    with pytest.raises(ValueError, match=message):
        TextEncoder.from_pretrained(offload=True, **options)


def test_offloading_makes_no_other_key_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nai_t5_core.weights.chosen.resolve_device", torch.device)
    here, there = (settings_of(None, "float16", "cuda", offload=offload) for offload in (False, True))
    assert here.key([3, 9, 1]) == there.key([3, 9, 1])


def simulated_cuda(monkeypatch: pytest.MonkeyPatch) -> list[SimulatedDevice]:
    """Has ``"cuda"`` be a device that is simulated."""
    made: list[SimulatedDevice] = []

    def make(device: torch.device) -> SimulatedDevice:
        made.append(SimulatedDevice())
        return made[-1]

    monkeypatch.setattr("nai_t5_core.prompts.choices.resolve_device", torch.device)
    monkeypatch.setattr("nai_t5_core.prompts.loading.resolve_device", torch.device)
    monkeypatch.setattr("nai_t5_core.weights.chosen.resolve_device", torch.device)

    def move(self: Any, stack: Any, change: Any) -> None:
        self.start(stack, make(CPU))

    monkeypatch.setattr(Offload, "move", move)
    return made


@pytest.mark.parametrize("loras", [(), ((toy_lora(EMBEDDED), 0.5),)])
def test_the_text_encoder(loras: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = TextEncoder.from_pretrained(dtype="float32", device="cpu", optimize=False, loras=loras)
    made = simulated_cuda(monkeypatch)
    encoder = TextEncoder.from_pretrained(dtype="float32", device="cuda", loras=loras, offload=True)
    assert len(made) == 1 and encoder.report is not None and encoder.report.device.type == "cuda"
    assert "offloaded layer by layer" in repr(encoder)
    found = encoder.encode(["a cat", "two dogs"], "pixart-sigma").hidden_states
    assert_near(found, expected.encode(["a cat", "two dogs"], "pixart-sigma").hidden_states)
    add_embeddings(encoder, torch.ones(2, encoder.stack.config.d_model), "<new>")
    add_embeddings(expected, torch.ones(2, encoder.stack.config.d_model), "<new>")
    assert_near(encoder.encode(["a <new> cat"]).hidden_states, expected.encode(["a <new> cat"]).hidden_states)


def test_a_prompt_that_is_kept_touches_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = simulated_cuda(monkeypatch)
    monkeypatch.setattr("nai_t5_core.prompts.late.resolve_device", lambda device: CPU)
    options: Any = {"dtype": "float32", "device": "cuda", "offload": True}
    store = open_store(tmp_path)
    first = TextEncoder.from_pretrained(cache=store, **options)
    found = first.encode(["a cat"]).hidden_states
    copies = len(made[0].copies)
    assert torch.equal(first.encode(["a cat"]).hidden_states, found) and len(made[0].copies) == copies
    LiveLoras(first).add(toy_lora(EMBEDDED), 0.5)
    assert not torch.equal(first.encode(["a cat"]).hidden_states, found)
    store.wait()
    later = TextEncoder.from_pretrained(cache=tmp_path, **options)
    assert torch.equal(later.encode(["a cat"]).hidden_states, found) and not later.is_loaded
