"""Threads that share an encoder: each call gives what it gives alone, also while LoRAs and scales change."""

from __future__ import annotations

import copy
import pickle
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from typing import Any

import pytest
import torch
from backend_cases import CASES, CONFIG, FLOATS, bound
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from hf_toys import assert_near
from torch import Tensor
from toy_loras import toy_lora, toy_tables

from nai_t5_core.backends.choose import prepack, quantize_int8, why_not_int8
from nai_t5_core.backends.cuda.int8 import quantise_at_rest, quantise_stack
from nai_t5_core.backends.offload.offload import offload_layers
from nai_t5_core.backends.products import INT8_ONEDNN, ONEDNN
from nai_t5_core.float16.generation_guard import generate_guarded
from nai_t5_core.float16.guard import ScaleTightenedWarning, guard
from nai_t5_core.generation.t5 import T5
from nai_t5_core.lora.files import Lora
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.lora.loras import Loras
from nai_t5_core.model.encoder import LAYOUTS
from nai_t5_core.model.layers import NoInit
from nai_t5_core.model.turns import Turns
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.prompts.textual_inversion import add_embeddings

IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(3))
MASK = padding_mask([12, 5, 1], 12)
THREADS = 8
# Weights are packed by the second.
CALLS = 3


@torch.no_grad()
def encode(stack: Any) -> Tensor:
    """By this thread alone: whether gradients are recorded is each thread's own."""
    out: Tensor = stack(IDS, MASK)
    return out


def at_once(call: Callable[[], Any], threads: int = THREADS) -> list[Any]:
    """What a call gives to each of so many threads that begin together."""
    barrier = threading.Barrier(threads)

    def begin() -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(threads) as pool:
        return [running.result() for running in [pool.submit(begin) for _ in range(threads)]]


def fresh_encoders() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every backend, layout and dtype that this machine can test, one after the other and again."""
    made: list[tuple[str, Callable[[], Any]]] = []
    for name, case in CASES.items():
        for layout in LAYOUTS:
            for dtype in FLOATS:
                try:
                    stack = bound(case, layout, dtype)
                except pytest.skip.Exception:
                    continue
                if not case.holds_weights:
                    make = lambda stack=stack: copy.deepcopy(stack)  # noqa: E731 - one of a table
                else:
                    make = lambda case=case, layout=layout, dtype=dtype: bound(case, layout, dtype)  # noqa: E731
                made.append((f"{name}, {layout}, {dtype}", make))
    return cycle(made)


def test_fresh_encoders_give_every_thread_what_one_gets(request: pytest.FixtureRequest, record_property: Any) -> None:
    count = request.config.getoption("--fresh-encoders")
    expected: dict[str, list[Tensor]] = {}
    for name, make in islice(fresh_encoders(), count):
        if name not in expected:
            alone = make()
            expected[name] = [encode(alone) for _ in range(CALLS)]
        stack = make()
        for number in range(CALLS):
            for found in at_once(lambda stack=stack: encode(stack)):
                assert torch.equal(found, expected[name][number]), f"{name}, call {number + 1}"
    record_property("fresh encoders, each called 3 times by 8 threads at once, 0 wrong", count)


@pytest.mark.parametrize("options", [{}, {"optimize": False}, {"quantize": "int8"}])
def test_a_text_encoder_gives_every_thread_what_one_gets(options: dict[str, Any]) -> None:
    """Each with prompts of its own: tokenizers are shared as well."""
    if "quantize" in options and why_not_int8(build_stack(CONFIG, random_state(CONFIG))) is not None:
        pytest.skip("this processor has no fast products of bytes")
    made = [TextEncoder.from_pretrained(dtype="float32", device="cpu", **options) for _ in range(2)]
    alone, shared = made
    prompts = [[f"a {word} of {number} cats", "two dogs"] for number in range(4) for word in ("photo", "row")]
    expected = [alone.encode(texts, max_length=16).hidden_states for texts in prompts]
    waiting = iter(range(len(prompts)))
    lock = threading.Lock()

    def one() -> bool:
        with lock:
            number = next(waiting)
        found = [shared.encode(prompts[number], max_length=16).hidden_states for _ in range(CALLS)]
        return all(torch.allclose(hidden, expected[number], atol=1e-5) for hidden in found)

    assert all(at_once(one))


def test_embeddings_are_added_while_threads_encode() -> None:
    """A prompt finds the word and its vectors, or neither; and words that come at once get vectors of their own."""
    encoder = TextEncoder.from_pretrained(dtype="float32", device="cpu", optimize=False)
    first, width = encoder.stack.config.vocab_size, encoder.stack.config.d_model
    words = iter([f"<word-{number}>" for number in range(THREADS)])
    lock = threading.Lock()

    def one() -> tuple[str, list[int]]:
        with lock:
            word = next(words)
        ids = add_embeddings(encoder, torch.full((2, width), float(ord(word[-2]))), word)
        for other in range(THREADS):
            encoder.encode([f"a photo of <word-{other}>"])
        return word, ids

    found = dict(at_once(one))
    assert sorted(number for ids in found.values() for number in ids) == list(range(first, first + 2 * THREADS))
    for word, ids in found.items():
        assert (encoder.stack.shared.weight[ids] == ord(word[-2])).all()


def encoding_until(done: threading.Event, stack: Any) -> Iterator[Tensor]:
    while not done.is_set():
        yield encode(stack)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", [LiveLoras, Loras])
def test_a_lora_comes_and_goes_between_calls(kind: Any, name: str, layout: Any) -> None:
    """Of projections, tables and norms, which are set one after the other: no call sees a part of them."""
    case = CASES[name]
    if kind is Loras and case.holds_weights:
        pytest.skip("weights that are held take no merged LoRA")
    stack = bound(case, layout)
    lora = Lora("all", {**toy_lora(CONFIG).changes, **toy_tables(CONFIG).changes})
    for _ in range(CALLS):
        encode(stack)
    loras, strengths = kind(stack), (0.3, 0.9)
    states = [encode(stack)]
    loras.add(lora, strengths[0], "style")
    for strength in strengths:
        loras.set_strength("style", strength)
        # A backend that the block is lent to packs by the second call.
        states += [encode(stack) for _ in range(CALLS)]
    loras.remove("style")
    states += [encode(stack) for _ in range(CALLS)]
    done = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(lambda: list(encoding_until(done, stack))) for _ in range(4)]
        try:
            for _ in range(12):
                loras.add(lora, strengths[0], "style")
                loras.set_strength("style", strengths[1])
                loras.remove("style")
        finally:
            done.set()
        found = [hidden for each in running for hidden in each.result()]
    assert found and all(any(torch.equal(hidden, state) for state in states) for hidden in found)
    assert any(torch.equal(encode(stack), state) for state in states)


def overflowing_state(config: Any) -> dict[str, Tensor]:
    """Weights whose activations exceed float16 in the feed-forward of every layer."""
    return {
        name: tensor * 2e4 if name.endswith("DenseReluDense.wo.weight") else tensor
        for name, tensor in random_state(config).items()
    }


@pytest.mark.filterwarnings("ignore::nai_t5_core.float16.guard.ScaleTightenedWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_are_tightened_once(layout: Any) -> None:
    """Were they by two threads, weights would be multiplied twice, and wrong for good."""
    state = overflowing_state(CONFIG)
    for _ in range(6):
        alone, stack = (build_stack(CONFIG, state, torch.float16, layout) for _ in range(2))
        alone.guard = stack.guard = guard
        expected = encode(alone)
        assert alone.scales != build_stack(CONFIG, state, torch.float16, layout).scales
        for hidden in at_once(lambda stack=stack: encode(stack)):
            assert torch.equal(hidden, expected)
        assert stack.scales == alone.scales


def test_a_decoders_scales_are_tightened_once() -> None:
    config = TOY_CONFIGS["v1.1"]

    def made() -> T5:
        model = T5(config, "fused", NoInit, device="cpu", dtype=torch.float16)
        model.init_weights(torch.Generator().manual_seed(0))
        with torch.no_grad():
            model.decoder.block[1].layer[2].DenseReluDense.wo.weight.mul_(4e4)
        return model.eval()

    alone, model = made(), made()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScaleTightenedWarning)
        expected = generate_guarded(alone, IDS, MASK, max_new_tokens=4)
        found = at_once(lambda: generate_guarded(model, IDS, MASK, max_new_tokens=4), threads=4)
    assert alone.decoder_scales != made().decoder_scales
    assert model.decoder_scales == alone.decoder_scales
    assert all(torch.equal(ids, expected) for ids in found)


def test_a_change_within_a_call_is_an_error_and_leaves_the_encoder_usable() -> None:
    stack = bound(CASES["torch"])
    loras = LiveLoras(stack)
    handle = stack.encoder.block[0].register_forward_hook(lambda *_: loras.add(toy_lora(CONFIG)) and None)
    with pytest.raises(RuntimeError, match="cannot be changed from within its own call; change it before or after"):
        encode(stack)
    handle.remove()
    before = encode(stack)
    loras.add(toy_lora(CONFIG))
    assert not torch.equal(encode(stack), before)


def test_calls_run_side_by_side_and_changes_alone() -> None:
    turns, barrier, seen = Turns(), threading.Barrier(2), []

    def call() -> None:
        with turns.call(), turns.call():
            barrier.wait(timeout=10)

    def change() -> None:
        with turns.change(), turns.change(), turns.call():
            seen.append("begun")
            time.sleep(0.002)
            seen.append("done")

    at_once(call, threads=2)
    at_once(change)
    assert seen == ["begun", "done"] * THREADS


CPU = torch.device("cpu")
CHANGES: dict[str, Callable[[Any], Any]] = {
    "prepack": lambda stack: prepack(stack, "onednn"),
    "quantize": lambda stack: quantize_int8(stack, "onednn"),
    "quantise for a card": lambda stack: quantise_stack(stack, CPU),
    "quantise in the host's memory": lambda stack: quantise_at_rest(stack, CPU),
    "offload": offload_layers,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_replaces_weights_waits_for_the_calls_that_run(change: str) -> None:
    """Else the call would have some layers as they were, and others as they are to be."""
    for backend, how in ((ONEDNN, "prepack"), (INT8_ONEDNN, "quantize")):
        if change == how and (reason := backend.missing(CPU, torch.float32)):
            pytest.skip(reason)
    stack = bound(CASES["torch"])
    before = [module for module in stack.modules() if isinstance(module, NoInit.Linear)]
    expected, is_within, may_go_on = encode(stack), threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        is_within.set()
        assert may_go_on.wait(30)

    hook = stack.encoder.block[0].register_forward_hook(stop)
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(encode, stack)
        assert is_within.wait(30)
        changing = pool.submit(CHANGES[change], stack)
        while not (stack.turns._waiting_changes or changing.done()):
            time.sleep(0.001)
        is_as_it_was = stack.offload is None and before == [
            module for module in stack.modules() if isinstance(module, NoInit.Linear)
        ]
        may_go_on.set()
        assert torch.equal(call.result(30), expected)
        changing.result(30)
    hook.remove()
    assert is_as_it_was
    assert_near(encode(stack), expected, 0.1)


def test_a_change_is_not_kept_waiting_by_ever_new_calls() -> None:
    stack = bound(CASES["torch"])
    done = threading.Event()
    with ThreadPoolExecutor(THREADS) as pool:
        running = [pool.submit(lambda: list(encoding_until(done, stack))) for _ in range(THREADS)]
        # Without it, a change that never has its turn would wait for ever.
        late = threading.Timer(60, done.set)
        late.start()
        try:
            LiveLoras(stack).add(toy_lora(CONFIG))
            assert not done.is_set(), "it had its turn only when no more calls came"
        finally:
            late.cancel()
            done.set()
    assert all(each.result() is not None for each in running)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stack: pickle.loads(pickle.dumps(stack))])
def test_copies_have_turns_of_their_own(copied: Any) -> None:
    stack = bound(CASES["torch"])
    with stack.turns.call():
        twin = copied(stack)
        with twin.turns.change():
            assert twin.turns is not stack.turns
