"""What users call to have layers rest in the host's memory."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import encoder_part
from conftest import random_state
from hf_toys import assert_near
from offload_toys import EMBEDDED, WIDE
from simulated_device import SimulatedDevice
from toy_loras import toy_lora
from toy_quantised import READ, quantised, write_quantised

from nai_t5_core.backends.cuda.int8 import quantise_block
from nai_t5_core.backends.offload.offload import CPU, Offload
from nai_t5_core.backends.quantised.projections import QuantisedLinear
from nai_t5_core.bench.doctor import offload as step
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.prompts.cache.settings import settings_of
from nai_t5_core.prompts.cache.store import open_store
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.prompts.textual_inversion import add_embeddings


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "the device is cpu; give device='cuda'"),
        (
            {"device": "cuda", "dtype": "float32", "quantize": "int8"},
            "cannot quantise a model in torch.float32 on cuda",
        ),
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


@pytest.mark.parametrize("kind", ["int8", "NF4", None])
def test_nor_does_offloading_bytes(kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels read them wherever they read those of a resident one; of the other kinds both are torch's."""
    monkeypatch.setattr("nai_t5_core.weights.chosen.resolve_device", torch.device)
    state = encoder_part(random_state(WIDE))
    path = write_quantised(tmp_path / "t5.safetensors", state if kind is None else quantised(state, READ[kind][1]))
    options: Any = {"quantize": "int8"} if kind is None else {}
    here, there = (settings_of(path, "float16", "cuda", offload=offload, **options) for offload in (False, True))
    assert here.key([3]) == there.key([3])


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


def test_the_text_encoder_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = TextEncoder.from_pretrained(dtype="float32", device="cpu", optimize=False)
    made, quantised_on = simulated_cuda(monkeypatch), quantising_here(monkeypatch)
    monkeypatch.setattr("nai_t5_core.prompts.choices.refuse_quantising", lambda *_: None)
    encoder = TextEncoder.from_pretrained(dtype="float16", device="cuda", offload=True, quantize="int8")
    assert quantised_on == [torch.device("cuda")] * exact.stack.config.num_layers
    assert "offloaded layer by layer" in repr(encoder)
    found = encoder.encode(["a cat"], "pixart-sigma").hidden_states.double()
    expected = exact.encode(["a cat"], "pixart-sigma").hidden_states.double()
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.02
    plain = sum(2 * form.out_features * form.in_features for form in forms_of(encoder.stack))
    assert 0 < sum(memory.nbytes for memory in made[0]._locked.values()) < plain * 0.6


def quantising_here(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that blocks were to be quantised on."""
    asked = list[torch.device]()

    def quantise(block: Any, dtype: torch.dtype, device: torch.device) -> None:
        asked.append(device)
        quantise_block(block, dtype, CPU)

    monkeypatch.setattr("nai_t5_core.backends.cuda.int8.quantise_block", quantise)
    return asked


def test_the_step_of_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 and in 8 bits, on a bus of 1 GB in a second."""
    made, quantised_on = simulated_cuda(monkeypatch), quantising_here(monkeypatch)
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    monkeypatch.setattr(step, "bus_rate", lambda *_: 1e9)
    monkeypatch.setattr(step, "missing_for_int8", lambda *_: None)
    monkeypatch.setattr(step, "timed", lambda call, device: {"ms": float(call().isfinite().all())})
    patient: Any = SimpleNamespace(config=EMBEDDED, dtype=torch.float32, device=torch.device("cuda"))
    found = step.measure(patient)
    assert len(made) == 2 and quantised_on == [torch.device("cuda")] * EMBEDDED.num_layers
    kinds = found["kinds"]
    assert list(kinds) == ["float32", "int8"] and kinds["int8"]["bytes"] < 0.3 * kinds["float32"]["bytes"]
    for each in kinds.values():
        assert each["bus_ms"] == pytest.approx(each["bytes"] / 1e6) and each["times"]["64"]["ms"] == 1
    assert json.loads(json.dumps(found)) == found


def forms_of(stack: Any) -> list[Any]:
    return [form for module in stack.modules() if isinstance(module, QuantisedLinear) for form in module.forms]


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
