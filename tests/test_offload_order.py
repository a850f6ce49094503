"""The order of copies and work of layers that come from the host's memory, simulated."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, get_ident
from time import sleep
from typing import Any

import pytest
import torch
from offload_toys import IDS, MASK, largest_layer, of_layers, offloaded, resident
from simulated_device import RaceError, SimulatedDevice, Stream
from torch import Tensor

from nai_t5_core.backends.offload.offload import offload_layers
from nai_t5_core.backends.offload.ring import Ring
from nai_t5_core.model.turns import Turns


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


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


def test_calls_that_wait_while_layers_are_offloaded_take_turns_as_well() -> None:
    stack, device = resident(of_layers(4)), SimulatedDevice()
    prompts = [IDS[:, : 3 + number] for number in range(4)]
    expected = [stack(prompt) for prompt in prompts]
    stack.turns = turns = CountedTurns()
    within, most = set[int](), []

    def come(*_: Any) -> None:
        within.add(get_ident())
        most.append(len(within))
        sleep(0.01)

    stack.encoder.block[0].register_forward_hook(come)
    stack.encoder.block[3].register_forward_hook(lambda *_: within.discard(get_ident()))

    def encode(prompt: Tensor) -> Tensor:
        with torch.no_grad():
            return stack(prompt)

    with ThreadPoolExecutor(4) as pool:
        with turns.change():
            found = [pool.submit(encode, prompt) for prompt in prompts]
            while turns.asked < 4:
                sleep(0.001)
            offloaded(stack, device)
        assert all(torch.equal(a.result(30), b) for a, b in zip(found, expected, strict=True))
    assert max(most) == 1 and len(most) == 4


class CountedTurns(Turns):
    """Counts how many threads have asked for a call."""

    asked = 0

    @contextmanager
    def call(self) -> Iterator[None]:
        self.asked += 1
        with super().call():
            yield


def test_a_call_that_waits_while_the_encoder_goes_to_the_cpu() -> None:
    """What computed on the device is gone when it has its turn."""
    stack, device = resident(of_layers(4)), SimulatedDevice()
    expected = stack(IDS)
    offload: Any = offload_layers(stack).offload
    offload.start(stack, device)
    assert stack.runner is not None
    stack.turns = turns = ToldTurns()

    def encode() -> Tensor:
        with torch.no_grad():
            return stack(IDS)

    with ThreadPoolExecutor(1) as pool:
        with turns.change():
            found = pool.submit(encode)
            assert turns.is_asked_for.wait(30)
            offload.rest(stack)
        assert torch.equal(found.result(30), expected)


class ToldTurns(Turns):
    """Tells when a call asks for its turn."""

    def __init__(self) -> None:
        super().__init__(one_at_a_time=True)
        self.is_asked_for = Event()

    @contextmanager
    def call(self) -> Iterator[None]:
        self.is_asked_for.set()
        with super().call():
            yield
