"""What is to be reached on a card, beside what the doctor found, and what it finds of memory."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS
from test_doctor_choice import examined, finding

from nai_t5_core.backends import choices
from nai_t5_core.backends.cuda.measured_card import MeasuredInt8
from nai_t5_core.bench.doctor import DoctorSettings, memory, speed
from nai_t5_core.bench.doctor.hollow import write_hollow
from nai_t5_core.bench.doctor.patient import Patient
from nai_t5_core.bench.doctor.report import as_markdown
from nai_t5_core.facts.config import encoder_tensors
from nai_t5_core.float16 import guard
from nai_t5_core.float16.guard import encode_guarded
from nai_t5_core.weights.load import load_encoder


def test_what_is_to_be_reached_stands_beside_what_was_found() -> None:
    ceilings = {"read_bytes_per_second": 1e12, "copy_bytes_per_second": 1e12, "products": {"float16": 1e14}}
    work = {"flops": 1e11, "bytes": 2e9}
    times = {length: {"ms": ms, "host_ms": 1.0, "work": work} for length, ms in (("64", 4.0), ("512", 8.0))}
    speed = {
        "model": "t5-v1_1-xxl",
        "words": "t5-v1_1-xxl with random weights",
        "dtype": "float16",
        "by": "kernels",
        "times": times,
    }
    each = {"ms": 12.0, "host_ms": 1.0, "first_seconds": 20}
    steps = {"peers-compiled": {"times": {"64": each, "512": each}}, "nai-t5-compiled": {"times": {"512": each}}}
    text = as_markdown(examined(ceilings=ceilings, speed=speed, **steps))
    for row in (
        "| 64 tokens, 16 bits | ≤ 3.4 ms | 4.00 ms |",
        "| 64 tokens, 16 bits: multiple of the least time | ≤ 1.2 | 2.00 |",
        "| 512 tokens, 16 bits | ≤ 7.5 ms | 8.00 ms |",
        "| 512 tokens, 16 bits: multiple of the least time | ≤ 1.55 | 4.00 |",
        "| transformers compiled / ours, 64 tokens | ≥ 2.0 | 3.00 |",
        "| transformers compiled / ours, 512 tokens | ≥ 1.25 | 1.50 |",
        "| nai-t5 by flex, compiled / ours, 512 tokens | ≥ 1.15 | 1.50 |",
        "| ComfyUI's dynamic memory: stock / ours | ≥ 2 | by tests/comfyui/timing.py card |",
    ):
        assert row in text
    measured = as_markdown(examined(ceilings=ceilings, speed=speed, choice=finding(lengths={"64": 3.2})))
    assert (
        "| 64 tokens, 16 bits | ≤ 3.4 ms | 3.20 ms |" in measured and "the timed model: 64 tokens 3.20 ms" in measured
    )
    assert "To reach" not in as_markdown(examined(speed={**speed, "model": "t5-v1_1-large"}))


def test_8_bits_memory_and_layers_from_the_host_stand_beside_what_they_are_to_be() -> None:
    ceilings = {"read_bytes_per_second": 1e12, "copy_bytes_per_second": 1e12, "products": {"float16": 1e14}}
    bytes_speed = {
        "model": "t5-v1_1-xxl",
        "dtype": "float16",
        "times": {"64": {name: {"ms": ms} for name, ms in (("16 bits, auto", 4.0), ("int8, auto", 3.0))}},
        "work": {"64": {"flops": 1e11, "bytes": 1.5e9}},
    }
    bytes_of = {"load_seconds": 2.0, "reserved_bytes": 11e9}
    kinds = {
        "float16": {"most_at_load": 9.6e9, "kept_bytes": 9.5e9, "most_while_encoding": 9.58e9, **bytes_of},
        "int8": {"most_at_load": 5.88e9, "kept_bytes": 4.9e9, "most_while_encoding": 4.96e9, **bytes_of},
    }
    times = {length: {"ms": 200.0, "times the bus": ratio} for length, ratio in (("64", 1.1), ("512", 1.2))}
    offloaded = {"float16": {"bus_ms": 180.0, "bytes": 9e9, "device_bytes": 8e8, "times": times}}
    steps = {
        "memory": {"model": "t5-v1_1-xxl", "kinds": kinds},
        "offload": {"kinds": offloaded, "target": 1.15},
        "first-encode": {"seconds": 4.5, "times": {}},
        "transformers": {"dtype": "float16", "times": {"64 padded to 512": PADDED}},
    }
    # As where the step ``speed`` has failed: the model is known from others.
    text = as_markdown(examined(ceilings=ceilings, **{"8-bit-speed": bytes_speed}, **steps))
    for row in (
        "| 64 tokens, 16 bits | ≤ 3.4 ms | not measured |",
        "| 64 tokens, 8 bits | ≤ 2.1 ms | 3.00 ms |",
        "| 64 tokens, 8 bits: multiple of the least time | ≤ 1.5 | 2.00 |",
        "| transformers / ours, 64 tokens padded to 512 | ≥ 6 | 7.50 |",
        "| memory of the card, float16 | ≤ 9.6 GB | 9.58 GB |",
        "| the same while it is loaded, float16: multiple of what stays | ≤ 1.15 | 1.01 |",
        "| memory of the card, int8 | ≤ 5.0 GB | 4.96 GB |",
        "| the same while it is loaded, int8: multiple of what stays | ≤ 1.15 | 1.20 |",
        "| layers from the host, float16, 64 tokens / the bus's time | ≤ 1.15 | 1.10 |",
        "| layers from the host, float16, 512 tokens / the bus's time | ≤ 1.15 | 1.20 |",
        "| first encode of a fresh process | ≤ 10 s | 4.5 s |",
        "| int8 | 2.0 s | 5.88 GB | 4.90 GB | 4.96 GB | 11.00 GB |",
    ):
        assert row in text
    measured = {"measured": MeasuredInt8(inputs_from=16).model_dump(), "times": {}, "lengths": {"64": 1.8}}
    text = as_markdown(examined(ceilings=ceilings, **{"8-bit-speed": bytes_speed, "int8-choice": measured}))
    assert "| 64 tokens, 8 bits | ≤ 2.1 ms | 1.80 ms |" in text, "in what was measured to be the fastest"
    measured["wrong"] = ["off by 1"]
    text = as_markdown(examined(ceilings=ceilings, **{"8-bit-speed": bytes_speed, "int8-choice": measured}))
    assert "| 64 tokens, 8 bits | ≤ 2.1 ms | 3.00 ms |" in text
    nothing = as_markdown(examined(**{"8-bit-speed": {**bytes_speed, "times": {"64": {}}}}))
    assert nothing.count("| not measured |") == 6 + 4 + 4 + 4 + 1


PADDED = {"transformers": {"ms": 30.0}, "ours": {"ms": 4.0}, "ratio": 7.5, "differs": 1e-3}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_checkpoint_with_holes_is_loaded_as_any_other(dtype: torch.dtype, tmp_path: Path) -> None:
    config = TOY_CONFIGS["umt5"].encoder_only()
    file = write_hollow(tmp_path / "zeros.safetensors", config, dtype)
    stack = load_encoder(file, dtype, "cpu")
    weights = dict(stack.named_parameters()) | dict(stack.named_buffers())
    assert stack.config == config and sum(map(torch.numel, weights.values())) == sum(
        math.prod(shape) for shape in encoder_tensors(config).values()
    )
    for name, weight in weights.items():
        assert bool((weight == (1.0 if "norm" in name else 0.0)).all()), name
    assert torch.equal(stack(torch.ones(1, 5, dtype=torch.long)), torch.zeros(1, 5, config.d_model, dtype=dtype))


def test_what_an_encoder_takes_of_a_card_is_read_when_it_is_loaded_and_when_it_has_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a card that says what it has given: by the number of times that it was asked to forget its peak.

    As torch does, it has no statistics before it was started.
    """
    forgotten: list[Any] = []
    encoded: list[int] = []
    started: list[bool] = []

    def forget(device: Any) -> None:
        assert started, "Invalid device argument"
        forgotten.append(device)

    answers = {
        "init": lambda: started.append(True),
        "reset_peak_memory_stats": forget,
        "synchronize": lambda _: None,
        "memory_allocated": lambda _: 700,
        "max_memory_allocated": lambda _: (900, 720)[len(forgotten) - 1] + 5 * len(encoded),
        "max_memory_reserved": lambda _: 1000,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    clock = iter((0.0, 0.0015))
    monkeypatch.setattr(memory, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    file = write_hollow(tmp_path / "zeros.safetensors", TOY_CONFIGS["v1.1"].encoder_only(), torch.float32)
    encode = encode_guarded
    monkeypatch.setattr(guard, "encode_guarded", lambda stack, ids: encoded.append(ids.shape[1]) or encode(stack, ids))
    found = memory.measured(str(file), "cpu", "float32")
    assert encoded == [64, 64, 512, 512] and len(forgotten) == 2
    assert {name: found[name] for name in ("most_at_load", "kept_bytes", "most_while_encoding", "reserved_bytes")} == {
        "most_at_load": 900,
        "kept_bytes": 700,
        "most_while_encoding": 740,
        "reserved_bytes": 1000,
    }
    assert found["load_seconds"] == 0.0015 and "auto: " in found["by"]


@pytest.mark.parametrize("missing", [None, "no bytes here"])
def test_memory_is_measured_in_processes_of_their_own(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def answer(source: str, *how: str) -> dict[str, float]:
        assert load_encoder(source, "float32", "cpu").config.num_layers == 8  # while the file is there
        asked.append(how)
        return {"kept_bytes": len(asked)}

    monkeypatch.setattr(memory, "in_a_fresh_process", answer)
    monkeypatch.setattr(choices, "missing_for_int8", lambda *_: missing)
    patient = Patient(DoctorSettings(device="cpu", model="t5-v1_1-small"))
    patient.dtype = torch.float16  # type: ignore[misc]
    found = memory.measure(patient)
    kinds = {"float16": {"kept_bytes": 1}} | ({} if missing else {"int8": {"kept_bytes": 2}})
    assert found == {"model": "t5-v1_1-small", "kinds": kinds}
    assert asked == [("cpu", "float16"), ("cpu", "float16", "int8")][: len(kinds)]


# ---------------------------------------------------------------------------------------------------------------------
# Where the time goes
# ---------------------------------------------------------------------------------------------------------------------


class Event:
    """An event of torch's profiler, of so many microseconds."""

    def __init__(self, name: str, start: float, end: float, device: Any = torch.autograd.DeviceType.CUDA) -> None:
        self.name, self.device_type, self.device_time_total = name, device, end - start
        self.time_range = SimpleNamespace(start=start, end=end)


EVENTS = [
    Event("aten::mm", 0, 90, torch.autograd.DeviceType.CPU),
    Event("Memcpy HtoD", 10, 12),
    Event("multiply", 15, 25),
    Event("attend", 25, 25.4),
    Event("attend", 26, 26.4),
    Event("multiply", 30, 40),
]


def test_what_an_encode_has_the_device_do_is_counted_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    profiled = SimpleNamespace(events=lambda: EVENTS)
    monkeypatch.setattr(speed, "profile", lambda **_: nullcontext(profiled))
    patient: Any = SimpleNamespace(config=SimpleNamespace(num_layers=2), device=torch.device("cpu"))
    found = speed._counted(patient, lambda: torch.zeros(1))
    assert (found["kernels"], found["kernels_per_layer"], found["copies"]) == (4, 2, {"Memcpy HtoD": 1})
    assert found["device_us"] == pytest.approx(20.8) and found["span_us"] == 30
    assert list(found["slowest_us"]) == ["multiply", "attend"] and found["slowest_us"]["attend"] == pytest.approx(0.8)
    text = as_markdown(examined(launches={"1 prompt of 64, by graphs": found}))
    assert "| 1 prompt of 64, by graphs | 4 | 2.0 | 1 | 0.02 ms | 0.03 ms |" in text
    assert "1 prompt of 64, by graphs: 0.02 ms multiply, 0.00 ms attend" in text


def test_products_by_themselves_are_told() -> None:
    rows = {"16": {"us": {"64×32": 1.26, "32×64": 2.0}, "encoder_ms": 0.1234}}
    ways = {"int8, qkv, 16 rows": ["qkv 16 rows 9.0 µs", "qkv 16 rows 11.0 µs", "qkv 16 rows 12.0 µs"]}
    products = {"dtype": "float16", "rows": rows}
    text = as_markdown(examined(products=products, **{"8-bit-products": {"times": ways}}))
    assert "**Products by torch, in float16**" in text and "| 16 rows | 1.3 µs | 2.0 µs | 0.12 ms |" in text
    assert "| int8, qkv, 16 rows | qkv 16 rows 9.0 µs | qkv 16 rows 11.0 µs; qkv 16 rows 12.0 µs |" in text
