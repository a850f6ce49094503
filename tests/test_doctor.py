"""The doctor: steps that fail take nobody with them, wrong numbers are found, and what was found is told."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nai_t5_core.bench import clock
from nai_t5_core.bench.clock import timed, timed_once
from nai_t5_core.bench.doctor import (
    Diagnosis,
    DoctorSettings,
    ceilings,
    cpu_products,
    examination,
    examine_machine,
    graphs,
    machine,
    numbers,
    speed,
)
from nai_t5_core.bench.doctor.advice import advice
from nai_t5_core.bench.doctor.model import model_of, weight_bytes
from nai_t5_core.bench.doctor.patient import Patient
from nai_t5_core.bench.doctor.report import as_markdown
from nai_t5_core.bench.doctor.steps import Step, all_steps
from nai_t5_core.bench.doctor.worker import StepProcess
from nai_t5_core.bench.peers import own_encoder
from nai_t5_core.cli import app
from nai_t5_core.facts.config import named_config
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.layers import NoInit
from nai_t5_core.weights.convert_quantised import convert_quantised
from nai_t5_core.weights.hub import EMBEDDED_MODEL
from nai_t5_core.weights.load import load_encoder

CPU = DoctorSettings(device="cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def fine(patient: Patient) -> dict[str, Any]:
    return {"process": os.getpid(), "device": str(patient.device)}


def raises(patient: Patient) -> dict[str, Any]:
    raise ValueError("a fault of ours")


def loses_the_device(patient: Patient) -> dict[str, Any]:
    raise RuntimeError("CUDA error: misaligned address")


def crashes(patient: Patient) -> dict[str, Any]:
    os._exit(7)


def hangs(patient: Patient) -> dict[str, Any]:
    time.sleep(60)
    return {}


def steps_of_a_bad_day() -> tuple[Step, ...]:
    """Found by the other process by its name."""
    return tuple(Step(run.__name__, "", run, 60) for run in (fine, raises, loses_the_device, crashes, hangs))


@pytest.mark.slow
def test_a_step_that_does_not_come_back_is_told_and_the_next_one_runs() -> None:
    process = StepProcess(CPU, steps_of_a_bad_day)
    try:
        first = process.run("fine", 60)
        assert first["status"] == "ok" and first["data"]["device"] == "cpu" and first["seconds"] > 0
        failed = process.run("raises", 60)
        assert (failed["status"], failed["message"]) == ("failed", "ValueError: a fault of ours")
        assert "test_doctor.py" in failed["where"]
        assert process.run("fine", 60)["data"]["process"] == first["data"]["process"]
        for name, status, message in (
            ("loses_the_device", "failed", "misaligned"),
            ("crashes", "crashed", "status 7"),
            ("hangs", "late", "stopped after 2 seconds"),
        ):
            before = process.run("fine", 60)["data"]["process"]
            outcome = process.run(name, 2 if name == "hangs" else 60)
            assert outcome["status"] == status and message in outcome["message"]
            after = process.run("fine", 60)
            assert after["status"] == "ok" and after["data"]["process"] != before
    finally:
        process.end()


def test_steps_that_do_not_fit_are_left_out_and_everything_is_written_down(tmp_path: Path) -> None:
    results = tmp_path / "found.jsonl"
    settings = DoctorSettings(device="cpu", budget=0.5, only=("machine", "masks"), results=results)
    diagnosis = examine_machine(settings)
    assert [outcome["status"] for outcome in diagnosis.outcomes.values()] == ["left out", "left out"]
    assert [json.loads(line)["step"] for line in results.read_text().splitlines()] == ["machine", "masks"]
    assert diagnosis.passed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            DoctorSettings(device="cpu", only=("dreams",)),
            r"unknown steps \['dreams'\]; allowed on cpu: machine, ceilings, numbers, masks, generation, speed",
        ),
        (DoctorSettings(device="cpu", model="t5-gigantic"), "unknown model size 't5-gigantic'"),
        (DoctorSettings(device="cpu", model="none/of/these"), "none/of/these does not exist"),
        (DoctorSettings(device="cpu", model="none.safetensors"), "none.safetensors does not exist"),
        (DoctorSettings(device="warp"), "device 'warp' cannot be examined; allowed: auto, cpu, cuda, mps"),
        (DoctorSettings(device="meta"), "device 'meta' cannot be examined; allowed: auto, cpu, cuda, mps"),
        (DoctorSettings(device="cpu", only=("machine", "kernels")), "the step kernels is for cuda, and this is cpu"),
        (DoctorSettings(device="cpu", budget=0.0), "budget=0; a number of seconds above 0 is needed"),
        (DoctorSettings(device="cpu", budget=float("nan")), "budget=nan; a number of seconds above 0 is needed"),
    ],
)
def test_what_cannot_be_examined_is_refused(settings: DoctorSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        examine_machine(settings)


@pytest.mark.parametrize("device", ["cuda:99", "mps"])
def test_a_device_that_does_not_compute_is_told_and_the_cpu_examined(device: str, tmp_path: Path) -> None:
    """Neither is here: no machine has a hundred cards, and those that test this have no GPU of Apple's."""
    results = tmp_path / "found.jsonl"
    found = examine_machine(DoctorSettings(device=device, only=("machine",), results=results))
    assert found.outcomes["device"]["status"] == "failed"
    message = found.outcomes["device"]["message"]
    assert f"'{device}'" in message and message.endswith("; the CPU is examined in its place")
    assert found.outcomes["machine"]["data"]["device"] == found.device == "cpu"
    assert not found.passed and len(advice(found)) == 3
    assert [json.loads(line)["step"] for line in results.read_text().splitlines()] == ["device", "machine"]
    assert f"device: {message}" in as_markdown(found)


@pytest.mark.parametrize(
    ("trial", "examined"),
    [
        ({"status": "ok", "data": {"wrong": []}}, "cuda"),
        ({"status": "ok", "data": {"wrong": ["a sum is off"]}}, "cpu"),
        ({"status": "failed", "message": "CUDA error: all CUDA-capable devices are busy or unavailable"}, "cpu"),
        ({"status": "crashed", "message": "its process ended with status -11"}, "cpu"),
        ({"status": "late", "message": "stopped after 60 seconds"}, "cpu"),
    ],
)
def test_what_becomes_of_a_device_that_is_tried(
    trial: dict[str, Any], examined: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, str]] = []

    class Process:
        def __init__(self, settings: DoctorSettings) -> None:
            self.device = settings.device

        def run(self, name: str, deadline: float) -> dict[str, Any]:
            ran.append((name, self.device))
            return {**trial, "seconds": 1.0} if name == "device" else {"status": "ok", "data": {}, "seconds": 1.0}

        def end(self) -> None:
            pass

    monkeypatch.setattr(examination, "StepProcess", Process)
    found = examine_machine(DoctorSettings(device="cuda", only=("sums", "speed")))
    rest = [("sums", "cuda"), ("speed", "cuda")] if examined == "cuda" else [("speed", "cpu")]
    assert ran == [("device", "cuda"), *rest]
    assert found.device == examined and found.passed == (examined == "cuda")


def test_a_step_that_the_budget_ends_is_told_from_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(process: StepProcess, name: str, deadline: float) -> dict[str, Any]:
        return {"status": "late", "message": f"stopped after {deadline:.0f} seconds", "seconds": deadline}

    monkeypatch.setattr(StepProcess, "run", late)
    for budget, message in ((480, "stopped after 60 seconds"), (20, "after 20 seconds, when the time for everything")):
        found = examine_machine(DoctorSettings(device="cpu", budget=budget, only=("masks",)))
        assert message in found.outcomes["masks"]["message"]
        assert ("everything" in found.outcomes["masks"]["message"]) == (budget == 20)


def test_a_device_that_the_budget_ends_the_trial_of_is_not_said_to_be_faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    late = {"status": "late", "message": "stopped after 20 seconds", "seconds": 20.0}
    monkeypatch.setattr(StepProcess, "run", lambda *_: dict(late))
    found = examine_machine(DoctorSettings(device="cuda", budget=20, only=("speed",)))
    assert found.device == "cuda" and found.outcomes["device"]["status"] == "late"
    assert found.outcomes["device"]["message"].endswith("when the time for everything was over")


def test_a_device_is_tried_by_what_it_computes() -> None:
    assert machine.try_device(Patient(CPU)) == {"wrong": []}


def test_the_parts_of_an_examination_that_need_no_device_to_try() -> None:
    assert "device" not in examine_machine(DoctorSettings(device="cpu", budget=0.5)).outcomes


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def test_a_model_of_a_user_is_what_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "LENGTHS", (20,))
    patient = Patient(DoctorSettings(device="cpu", model=str(EMBEDDED_MODEL)))
    stack = load_encoder(device="cpu", dtype=patient.dtype)
    ids = patient.ids(1, 20)
    with torch.no_grad():
        assert torch.allclose(patient.encode(ids), stack(ids), atol=0.05)
        own = own_encoder(patient.config, patient.state, patient.dtype)
        assert torch.allclose(own(ids), stack(ids), atol=0.05)
    timed_model = speed.measure_lengths(patient)
    assert timed_model["model"] == timed_model["words"] == str(EMBEDDED_MODEL)
    found = diagnosis_of("cpu", machine.describe(patient))
    assert advice(found)[2].startswith(f"{EMBEDDED_MODEL} in 16 bits (2.2 MB)")


def test_room_is_that_of_the_weights_as_they_lie(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    convert_quantised(EMBEDDED_MODEL, file, "q8_0")
    size = machine.describe(Patient(DoctorSettings(device="cpu", model=str(file))))["model"]
    # 8.5 bits for a number, of the table as well; norms are not quantised.
    assert 8.5 / 16 - 0.01 < size["quantised_bytes"] / size["bytes_in_16_bits"] < 8.5 / 16 + 0.01
    plain = machine.describe(Patient(DoctorSettings(device="cpu", model=str(EMBEDDED_MODEL))))["model"]
    assert plain["quantised_bytes"] is None


def test_published_sizes_have_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t5-small").mkdir()
    cpu = torch.device("cpu")
    assert model_of("t5-small", torch.float32, cpu).words == "t5-small with random weights"
    with pytest.raises(ValueError, match="t5-small"):  # an empty folder
        model_of("./t5-small", torch.float32, cpu)


def test_what_a_t5_xxl_takes() -> None:
    """As counted on the meta device: projections in 8 bits are half of themselves, and all else stays in 16."""
    config = named_config("t5-v1_1-xxl").encoder_only()
    stack = T5EncoderStack(config, "separate", NoInit, device="meta", dtype=torch.bfloat16)
    in_16_bits = sum(parameter.nbytes for parameter in stack.parameters())
    linear = sum(m.weight.nbytes for m in stack.modules() if isinstance(m, torch.nn.Linear))
    assert weight_bytes(config) == (in_16_bits, in_16_bits - linear // 2)


def test_weights_in_8_bits_are_timed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    patient = Patient(DoctorSettings(device="cpu", model=str(EMBEDDED_MODEL)))
    monkeypatch.setattr(speed, "LENGTHS", (20, 64))
    found = speed.measure_int8(patient)
    assert "reason" in found or (found["times"].keys() == {"20", "64"} and found["times"]["64"]["ms"] > 0)
    monkeypatch.setattr(speed, "why_not_int8", lambda stack: "no bytes here")
    assert speed.measure_int8(patient) == {"reason": "no bytes here"}


def test_what_multiplies_on_a_processor_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What auto takes is not compared with itself, and what there is not is told with its reason."""
    patient = Patient(DoctorSettings(device="cpu", model=str(EMBEDDED_MODEL)))
    monkeypatch.setattr(cpu_products, "LENGTHS", (20,))
    monkeypatch.setattr(cpu_products, "SMALL_CONFIGS", {"umt5": numbers.SMALL_CONFIGS["umt5"]})
    found = cpu_products.compare(patient)
    ways = found["by"].keys()
    assert found["wrong"] == [] and found["checked"] >= 30 * len(ways) and ways | found["missing"].keys()
    assert len(set(found["by"].values())) == len(ways) and found["times"].keys() == ways
    assert all(times["20"]["ms"] > 0 for times in found["times"].values())
    assert "amx" in ways or "products='amx' is not possible: " in found["missing"]["amx"]

    def off_by_a_little(stack: T5EncoderStack, way: str) -> T5EncoderStack:
        norm = stack.encoder.final_layer_norm
        norm.weight = torch.nn.Parameter(norm.weight * 1.1, requires_grad=False)
        return stack

    monkeypatch.setattr(cpu_products, "prepack", off_by_a_little)
    monkeypatch.setattr(cpu_products, "quantize_int8", lambda stack, way: stack)
    wrong = cpu_products.compare(patient)["wrong"]
    assert wrong and all(line.startswith("auto, umt5, ") and "off by" in line for line in wrong)


def test_steps_have_names_of_their_own() -> None:
    names = [step.name for step in all_steps()]
    assert len(set(names)) == len(names)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def test_right_numbers_are_right_and_wrong_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "SMALL_CONFIGS", {"umt5": numbers.SMALL_CONFIGS["umt5"]})
    found = numbers.check_stacks(Patient(CPU))
    assert found["wrong"] == [] and found["checked"] > 100
    assert {"umt5, float32, fused", "umt5, float16, separate", "umt5, float64, fused"} <= set(found["largest_errors"])

    def off_by_a_little(stack: T5EncoderStack, *_: Any) -> T5EncoderStack:
        if stack.dtype == torch.float32:
            norm = stack.encoder.final_layer_norm
            norm.weight = torch.nn.Parameter(norm.weight * 1.01)  # a new one: models share what they read alike
        return stack

    monkeypatch.setattr(numbers, "_placed", off_by_a_little)
    wrong = numbers.check_stacks(Patient(CPU))["wrong"]
    assert wrong and all("float32" in line and "off by" in line for line in wrong)


def test_a_nan_and_another_shape_are_wrong() -> None:
    ones = torch.ones(2, 3)
    assert not numbers.difference(ones * float("nan"), ones) <= 1
    assert not numbers.difference(ones[:1], ones) <= 1
    assert numbers.difference(ones * 1.5, ones) == 0.5


def test_every_mask_is_asked_with_every_policy() -> None:
    names = [question.name for question in numbers.questions(numbers.SMALL_CONFIGS["v1.1"], 96)]
    assert len(names) == len(set(names)) == 2 + 4 * 4


def test_times_are_medians_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clock that calls move, and on which a call takes 4, 2 or 9 microseconds, and its device 1 more."""
    now, taken = [0.0], itertools.cycle((4e-6, 2e-6, 9e-6))

    def passing(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(clock, "synchronize", lambda _: passing(1e-6))
    monkeypatch.setattr(clock, "_LEAST_SECONDS", 1e-6)
    found = timed(lambda: passing(next(taken)), torch.device("cpu"), warm_ups=0)
    assert found == pytest.approx({"ms": 0.005, "lowest_ms": 0.003, "host_ms": 0.004})


@pytest.mark.parametrize("device", ["cuda:0", "xpu:0", "mtia:0", "mps"])
def test_a_call_is_timed_until_its_device_is_done(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of each device's own wait, one that can be seen here."""
    seen: list[Any] = []

    def wait(*numbered: torch.device) -> None:
        seen.append(numbered)
        time.sleep(0.02)

    monkeypatch.setattr(getattr(torch, torch.device(device).type), "synchronize", wait)
    duration, result = timed_once(lambda: seen.append("the call"), torch.device(device))
    expected = () if device == "mps" else (torch.device(device),)
    assert seen == [expected, "the call", expected] and result is None
    assert duration.whole - duration.host >= 0.02


def test_a_device_that_cannot_be_waited_for_is_not_timed() -> None:
    with pytest.raises(ValueError, match=r"torch has no torch.meta.synchronize, without which meta cannot be timed"):
        timed_once(lambda: None, torch.device("meta"))


# ---------------------------------------------------------------------------------------------------------------------
# What is told
# ---------------------------------------------------------------------------------------------------------------------

MACHINE = {
    "system": "Linux 6, x86_64",
    "python": "3.12.3",
    "processor": "A processor",
    "instruction_sets": ["avx2"],
    "cores": 8,
    "threads": 8,
    "memory_bytes": 128e9,
    "free_bytes": 64e9,
    "device": "cuda",
    "card": None,
    "versions": {"torch": "2.11.0"},
    "compilers": [],
    "dtype": "float16",
    "model": {"name": "A T5-XXL", "bytes_in_16_bits": 9.52e9, "bytes_in_8_bits": 4.89e9},
    "missing": {"kernels of ours for the CPU": "this processor has no AVX512"},
}
CARD = {"name": "A card", "capability": "8.9", "driver": "580", "memory_bytes": 24e9, "free_bytes": 20e9}


def diagnosis_of(device: str, machine: dict[str, Any], **steps: dict[str, Any]) -> Diagnosis:
    found = {"machine": machine, **steps}
    outcomes = {
        name: {"title": name, "status": "wrong" if data.get("wrong") else "ok", "seconds": 1.0, "data": data}
        for name, data in found.items()
    }
    return Diagnosis(outcomes, device)


@pytest.mark.parametrize(
    ("device", "machine", "told"),
    [
        (
            "cpu",
            {**MACHINE, "free_bytes": 4e9, "model": {**MACHINE["model"], "quantised_bytes": 2.9e9}},
            "whose weights stay quantised (2.9 GB), fits: memory has 4 GB to give",
        ),
        ("cuda", {**MACHINE, "card": CARD}, "fits: A card has 20 GB to give"),
        (
            "cuda",
            {**MACHINE, "card": {**CARD, "free_bytes": 8e9}},
            'needs quantize="int8" (4.9 GB) here: A card has 8 GB',
        ),
        (
            "cuda",
            {**MACHINE, "card": {**CARD, "free_bytes": 8e9}, "missing": {"weights in int8": "it is AMD's"}},
            "load it with offload=True",
        ),
        ("cuda", {**MACHINE, "card": {**CARD, "free_bytes": 4e9}}, "load it with offload=True"),
        ("cpu", MACHINE, "fits: memory has 64 GB to give"),
        ("cpu", {**MACHINE, "free_bytes": 8e9}, 'needs quantize="int8"'),
        ("cpu", {**MACHINE, "free_bytes": 4e9}, "use a smaller T5"),
    ],
)
def test_advice_by_room(device: str, machine: dict[str, Any], told: str) -> None:
    lines = advice(diagnosis_of(device, machine))
    assert len(lines) == 3 and told in lines[2]
    assert ("AVX512" in lines[0]) == (device == "cpu")


@pytest.mark.parametrize(
    ("products", "told"),
    [
        ({"float32": 8e12, "bfloat16": "no", "float16": 7e12}, 'Leave dtype="auto"'),
        ({"float32": 8e12, "bfloat16": "no", "float16": 2e12}, "products in float32 are 4.0 times as fast"),
        ({}, 'Leave dtype="auto"'),
    ],
)
def test_advice_by_what_a_card_multiplies_fast(products: dict[str, Any], told: str) -> None:
    card = {**MACHINE, "card": {**CARD, "capability": "6.1"}}
    assert told in advice(diagnosis_of("cuda", card, ceilings={"products": products}))[0]


def test_what_layers_from_the_host_take_is_told_beside_the_bus() -> None:
    times = {"64": {"ms": 190.0, "times the bus": 1.05}}
    half = {"times": times, "bytes": 9.26e9, "bus_ms": 181.0, "device_bytes": 0.9e9}
    int8 = {**half, "bytes": 4.64e9}
    found = {"kinds": {"float16": half, "int8": int8}, "target": 1.15}
    text = as_markdown(diagnosis_of("cuda", {**MACHINE, "card": CARD}, offload=found))
    assert "In float16 the bus takes 181.0 ms for 9.26 GB, and the card gives 0.90 GB." in text
    assert "for 4.64 GB" in text and "An encode is to take at most 1.15 times as long as the bus." in text
    assert "64 tokens, float16" in text and "64 tokens, int8" in text and "190.0 ms" in text and "1.05" in text


def test_advice_on_8_bits_is_of_what_was_measured() -> None:
    times = {length: {"ms": ms, "host_ms": ms, "work": {}} for length, ms in (("64", 10.0), ("512", 100.0))}
    int8 = {"times": {"64": {"ms": 6.0}, "512": {"ms": 120.0}}}
    found = diagnosis_of("cpu", {**MACHINE, "missing": {}}, speed={"times": times, "by": "torch"}, int8=int8)
    assert "takes 60% for 64 and 120% for 512 tokens of the time above" in advice(found)[1]


def test_what_multiplies_on_a_processor_without_products_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before VNNI: oneDNN has products in the dtype, and none in 8 bits."""

    def missing(stack: T5EncoderStack, way: str) -> T5EncoderStack:
        raise ValueError("this processor has no fast products of bytes")

    patient = Patient(DoctorSettings(device="cpu", model=str(EMBEDDED_MODEL)))
    monkeypatch.setattr(cpu_products, "LENGTHS", (20,))
    monkeypatch.setattr(cpu_products, "SMALL_CONFIGS", {"umt5": numbers.SMALL_CONFIGS["umt5"]})
    monkeypatch.setattr(cpu_products, "quantize_int8", missing)
    found = cpu_products.compare(patient)
    assert found["checked"] > 0 and found["wrong"] == []
    assert all("no fast products of bytes" in found["missing"][f"{way}, int8"] for way in found["by"])


@pytest.mark.parametrize(
    ("amx", "onednn", "told"),
    [
        (
            (6.0, 80.0),
            (9.0, 90.0),
            'products="amx" takes 60% for 64 and 80% for 512 tokens of that time here: name it.',
        ),
        ((6.0, 80.0), (5.0, 70.0), 'products="onednn" takes 50% for 64 and 70% for 512 tokens of that time here'),
        ((6.0, 95.0), (9.5, 60.0), None),
    ],
)
def test_advice_on_what_multiplies_is_of_what_was_measured(
    amx: tuple[float, float], onednn: tuple[float, float], told: str | None
) -> None:
    """Clearly faster at each length, or left alone."""
    by_way = {"auto": (10.0, 100.0), "amx": amx, "onednn": onednn}
    times = {way: {"64": {"ms": short}, "512": {"ms": long}} for way, (short, long) in by_way.items()}
    found = {"times": times, "by": {way: f"by {way}" for way in times}, "checked": 4, "wrong": [], "missing": {}}
    diagnosis = diagnosis_of("cpu", {**MACHINE, "missing": {}}, **{"cpu-products": found})
    first = advice(diagnosis)[0]
    assert told in first if told else "products=" not in first
    assert '| products="amx" | by amx | 6.00 ms |' in as_markdown(diagnosis)


def test_wrong_results_come_before_any_advice() -> None:
    wrong = {"checked": 9, "wrong": ["off by 1", "off by 2"]}
    found = diagnosis_of("cpu", MACHINE, masks=wrong, generation={"checked": 3, "wrong": []})
    first, *rest = advice(found)
    assert first.startswith("Do not use what is computed here") and "the step masks" in first and len(rest) == 2
    assert "2 results wrong, of 12 that were checked:" in as_markdown(found)


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (
            {"masks": {"checked": 9, "wrong": []}, "numbers": {"checked": 4, "wrong": []}},
            "13 results were checked",
        ),
        ({}, "No results were checked."),
    ],
)
def test_how_many_results_were_checked_is_told(steps: dict[str, Any], told: str) -> None:
    assert told in as_markdown(diagnosis_of("cpu", MACHINE, **steps))


def test_the_reason_of_a_failure_is_told_to_its_end() -> None:
    reason = "RuntimeError: " + "a long story, " * 40 + "and its end"
    found = {"title": "speed", "status": "failed", "seconds": 1.0, "message": reason}
    assert f"- speed: {reason}" in as_markdown(Diagnosis({"speed": found}, "cpu"))


@pytest.mark.parametrize(("ms", "told"), [(2.0, False), (0.5, True)])
def test_more_than_the_machine_allows_is_explained(ms: float, told: bool) -> None:
    ceilings = {"read_bytes_per_second": 1e12, "copy_bytes_per_second": 1e12, "products": {"bfloat16": 1e14}}
    times = {"64": {"ms": ms, "host_ms": ms, "work": {"flops": 1e11, "bytes": 1e9}}}
    speed = {"model": "m", "words": "m", "dtype": "bfloat16", "by": "torch", "times": times}
    assert ("Run it again" in as_markdown(diagnosis_of("cpu", MACHINE, ceilings=ceilings, speed=speed))) == told


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("reason", [None, "this processor has no fast products of bytes"])
def test_advice_on_8_bits_needs_no_other_step(reason: str | None, device: str) -> None:
    missing = {} if reason is None else {"weights in int8": reason}
    line = advice(diagnosis_of(device, {**MACHINE, "card": CARD if device == "cuda" else None, "missing": missing}))[1]
    assert line.startswith('quantize="int8"') if reason is None else line.endswith(f"{reason}.")


def test_what_an_old_torch_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1"))
    missing = machine.describe(Patient(CPU))["missing"]
    assert missing["flex attention, nor compiled encoders"] == "torch 2.5.1 is too old for it; it needs 2.6"


def test_memory_that_is_free_is_no_more_than_there_is() -> None:
    found = machine.describe(Patient(CPU))
    assert 0 < found["free_bytes"] <= found["memory_bytes"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # Of 1000 bytes used, 600 are files that were read and are not in use.
        ({"memory.max": "4000\n", "memory.current": "1000\n", "memory.stat": "anon 7\ninactive_file 600\n"}, 3600),
        ({"memory.max": "4000\n", "memory.current": "1000\n", "memory.stat": "anon 7\n"}, 3000),
        ({"memory.max": "4000\n", "memory.current": "1000\n"}, 3000),
        ({"memory.max": "max\n", "memory.current": "1000\n"}, None),
        ({}, None),
    ],
)
def test_what_a_container_has_left(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert machine._bytes_below_the_limit(tmp_path) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [("MemTotal: 9 kB\nMemAvailable:  7 kB\n", 7168), ("MemTotal: 9 kB\n\n", None), ("", None), (None, None)],
)
def test_what_the_system_can_still_give(content: str | None, expected: int | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "meminfo").write_text(content)
    assert machine._available_bytes(tmp_path / "meminfo") == expected


def test_the_report_names_what_is_wrong_and_the_share_of_the_ceilings() -> None:
    ceilings = {
        "read_bytes_per_second": 1e12,
        "copy_bytes_per_second": 1e12,
        "products": {"float16": 1e14, "int8": "no"},
    }
    times = {"64": {"ms": 2.0, "host_ms": 1.0, "work": {"flops": 1e11, "bytes": 1e9}}}
    speed = {
        "model": "t5-v1_1-xxl",
        "words": "t5-v1_1-xxl with random weights",
        "dtype": "float16",
        "by": "torch",
        "times": times,
    }
    masks = {"checked": 9, "wrong": ["length 97, left mask: off by 0.3"] * 14}
    diagnosis = diagnosis_of("cuda", {**MACHINE, "card": CARD}, ceilings=ceilings, masks=masks, speed=speed)
    text = as_markdown(diagnosis)
    assert not diagnosis.passed
    assert "masks: length 97, left mask: off by 0.3" in text and "masks: and 2 more" in text
    assert "| 64 tokens | 2.00 ms | 1.00 ms | 1.00 ms, 50% of the time |" in text
    assert "| products of matrices in int8 | no |" in text


def test_every_way_of_attention_has_a_column() -> None:
    ways = {way: {"ms": 2.0 + number} for number, way in enumerate(graphs._ATTENTIONS)}
    flex = {"checked": 1, "wrong": [], "times": {"64": ways, "seconds in all": dict.fromkeys(ways, 1.0)}}
    text = as_markdown(diagnosis_of("cuda", {**MACHINE, "card": CARD}, flex=flex))
    assert "| tokens | sdpa | flex | flex, torch's options |" in text and "| 64 | 2.00 ms | 3.00 ms | 4.00 ms |" in text


def test_the_command(tmp_path: Path) -> None:
    markdown = tmp_path / "found.md"
    asked = ["doctor", "--device", "cpu", "--only", " machine", "--markdown", str(markdown)]
    picture = tmp_path / "found.svg"
    done = CliRunner().invoke(app, [*asked, "--picture", str(picture), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["passed"] and report["steps"]["machine"]["data"]["device"] == "cpu"
    text = markdown.read_text()
    assert "**Advice**" in text and len(report["advice"]) == 3
    assert all(f"- {line}" in text for line in report["advice"])
    svg = picture.read_text()
    assert svg.startswith("<svg") and "Advice" in svg and "url(http" not in svg


@pytest.mark.parametrize("option", ["--results", "--markdown", "--picture"])
@pytest.mark.parametrize(("name", "told"), [("", "is a folder; name a file"), ("none/found", "there is no folder")])
def test_files_that_cannot_be_written_are_refused_before_work(
    option: str, name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nai_t5_core.bench.doctor.examine_machine", lambda *_: pytest.fail("work began"))
    done = CliRunner().invoke(app, ["doctor", option, str(tmp_path / name)])
    assert isinstance(done.exception, OSError) and told in str(done.exception)


def test_a_folder_that_only_seems_to_be_writable_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The superuser may write everywhere, says the system, and finds out otherwise."""

    def refuses(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("nai_t5_core.bench.doctor.examine_machine", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr(sys.modules["nai_t5_core.cli.doctor"], "TemporaryFile", refuses)
    done = CliRunner().invoke(app, ["doctor", "--markdown", str(tmp_path / "found.md")])
    assert f"{tmp_path} cannot be written into (Read-only file system)" in str(done.exception)


def test_the_report_is_told_though_its_file_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("nai_t5_core.bench.doctor.examine_machine", lambda *_: diagnosis_of("cpu", MACHINE))
    monkeypatch.setattr("nai_t5_core.weights.whole_files.write_whole", full)
    done = CliRunner().invoke(app, ["doctor", "--markdown", str(tmp_path / "found.md")])
    assert isinstance(done.exception, OSError) and "\nAdvice\n" in done.stdout


@pytest.mark.parametrize("outcomes", [{}, {"machine": {"title": "", "status": "left out", "seconds": 0.0}}])
def test_no_advice_where_the_machine_was_not_looked_at(outcomes: dict[str, Any]) -> None:
    assert "None without the step machine, which did not run." in as_markdown(Diagnosis(outcomes, "cpu"))


def test_the_command_ends_with_status_1_if_a_number_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = diagnosis_of("cpu", MACHINE, masks={"checked": 1, "wrong": ["off by 1"]})
    monkeypatch.setattr("nai_t5_core.bench.doctor.examine_machine", lambda *_: wrong)
    found = CliRunner().invoke(app, ["doctor"])
    assert found.exit_code == 1
    assert "\nAdvice\n" in found.output and "[bold]" not in found.output


def test_nothing_that_our_kernels_compute_is_faster_than_the_ceilings() -> None:
    """On a CPU torch's products rearrange both matrices in every call, and are no upper limit."""
    if ceilings.why_not_kernels() is not None:
        pytest.skip("no kernels here")
    rates = ceilings._of_kernels(torch.device("cpu"))
    assert {"bfloat16", "float32", "int8"} <= rates.keys() and all(rate > 1e9 for rate in rates.values())
    assert ceilings._of_kernels(torch.device("cuda")) == {}
