"""What the doctor measures on a card, with times that are given: what is chosen, kept and told."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS
from test_doctor import CARD, MACHINE, diagnosis_of
from typer.testing import CliRunner

from nai_t5_core.backends.cuda.attention_shapes import USUAL
from nai_t5_core.backends.cuda.card import Card
from nai_t5_core.backends.cuda.card_choice import choice_for
from nai_t5_core.backends.cuda.device_refusals import missing_triton
from nai_t5_core.backends.cuda.int8 import quantise_stack
from nai_t5_core.backends.cuda.measured_card import (
    NEVER,
    TORCH,
    MeasuredCard,
    MeasuredInt8,
    MeasuredProduct,
    measured_file,
)
from nai_t5_core.bench.doctor import (
    Diagnosis,
    DoctorSettings,
    choosing,
    first_encode,
    fresh_process,
    int8_inputs,
    own_kernels,
)
from nai_t5_core.bench.doctor.fastest import (
    fastest_attention,
    fastest_for_few_rows,
    fastest_products,
    overlapping_rows,
    products_taken,
    those_of_a_table,
    without_slower_rows,
)
from nai_t5_core.bench.doctor.int8_inputs import int8_inputs_from, int8_overlapping_rows
from nai_t5_core.bench.doctor.kept_choice import flex_from_lengths, write_choice
from nai_t5_core.bench.doctor.patient import Patient
from nai_t5_core.bench.doctor.report import as_markdown
from nai_t5_core.bench.doctor.steps import all_steps
from nai_t5_core.cli import app

RTX = Card("NVIDIA GeForce RTX 4090", "sm_89")
TILE = {"block_rows": 32, "block_columns": 16, "block_depth": 16, "parts": 1, "stages": 2, "warps": 4}
FEW = {"block_columns": 16, "block_depth": 16, "parts": 1, "stages": 2, "warps": 4}
INT8 = {"block_columns": 32, "block_depth": 32, "parts": 1, "stages": 2, "warps": 4}
SHAPE = {"queries": 64, "keys": 32, "warps": 4, "stages": 2}


class Time:
    """As a WayTime, whose module needs Triton."""

    def __init__(self, kind: str, rows: int, way: str, microseconds: float, **configuration: int) -> None:
        self.kind, self.rows, self.way, self.microseconds = kind, rows, way, microseconds
        self.configuration = configuration


TIMES: list[Any] = [
    Time("gated", 16, "torch", 50),
    Time("gated", 16, "few rows", 40, **FEW),
    Time("gated", 16, "few rows", 44, **{**FEW, "stages": 3}),
    Time("plain", 16, "torch", 50),
    Time("plain", 16, "few rows", 49.5, **FEW),
    Time("gated", 256, "torch", 100),
    Time("gated", 256, "tiles", 80, **TILE),
]


@dataclass(frozen=True)
class Given:
    """As a Configuration, whose module needs Triton."""

    block_columns: int
    block_depth: int
    parts: int
    stages: int
    warps: int = 4


# Which has another one for the gated product than the fastest, and none that was timed for the plain one.
TABLE: Any = {
    ("gated", 16): (Given(16, 16, 1, 3),),
    ("plain", 16): (Given(64, 16, 1, 2),),
    ("gated", 128): (),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice_for.cache_clear()
    yield
    choice_for.cache_clear()


def ways(products: Any) -> dict[tuple[str, int], str]:
    return {(each.kind, each.rows): each.way for each in products}


def test_the_fastest_way_is_chosen_where_it_is_faster_than_noise() -> None:
    found = fastest_products(TIMES)
    assert ways(found) == {("gated", 16): "few rows", ("plain", 16): TORCH, ("gated", 256): "tiles"}
    assert found[0].configuration == FEW and (found[0].microseconds, found[0].by_torch) == (40, 50)


def test_what_makes_no_whole_layer_faster_is_left_to_torch() -> None:
    together = {"16": {"torch": 1.0, "measured": 1.0}, "256": {"torch": 1.0, "measured": 0.9}}
    kept = without_slower_rows(fastest_products(TIMES), together)
    assert ways(kept) == {("gated", 16): TORCH, ("plain", 16): TORCH, ("gated", 256): "tiles"}
    assert kept[0].microseconds == 50 and kept[0].configuration == {}


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"16": (9, 10), "32": (9, 10), "64": (9, 10), "128": (9, 10)}, 128),
        ({"16": (9, 10), "32": (9, 10), "64": (9.95, 10), "128": (9, 10)}, 32),
        ({"16": (10, 10), "32": (9, 10)}, 0),
        ({"16": (9, 10), "32": (None, 10)}, 16),
        ({"64": (9, 10), "16": (10, 10)}, 0),
        ({}, 0),
    ],
)
def test_up_to_how_many_rows_launches_overlap(times: dict[str, tuple[float | None, float]], expected: int) -> None:
    """By the times of overlapping launches and of others; the last is fastest by whatever products."""
    together = {
        rows: {"torch": 2 * other, "measured": other} | ({} if own is None else {"so": own, "otherwise": own + 1})
        for rows, (own, other) in times.items()
    }
    assert overlapping_rows(together, ("so", "otherwise")) == expected
    assert overlapping_rows(together, ("otherwise",)) == 0
    by_torch = {rows: {**each, "torch": each["measured"], "measured": 20.0} for rows, each in together.items()}
    assert overlapping_rows(by_torch, ("otherwise", "so")) == expected


def test_where_launches_overlap_our_products_are_taken_though_alone_they_are_no_faster() -> None:
    alone = fastest_products(TIMES)
    overlapping = {"so": fastest_for_few_rows(TIMES), "by the table": those_of_a_table(TIMES, TABLE)}
    assert ways(overlapping["so"]) == {("gated", 16): "few rows", ("plain", 16): "few rows"}
    assert [(each.microseconds, each.by_torch) for each in overlapping["so"]] == [(40, 50), (49.5, 50)]
    assert ways(overlapping["by the table"]) == {("gated", 16): "few rows"}
    assert overlapping["by the table"][0].configuration["stages"] == 3

    times = {"torch": 1.0, "measured": 1.0, "so": 0.9, "by the table": 0.95}
    together = {"16": times, "256": {"torch": 1.0, "measured": 0.9}}
    taken = products_taken(alone, overlapping, together)
    assert taken == (*overlapping["so"], alone[2])
    times["by the table"] = 0.85
    assert products_taken(alone, overlapping, together) == (*overlapping["by the table"], alone[2])
    times.update({"so": 1.0, "by the table": 1.0})
    assert products_taken(alone, overlapping, together) == without_slower_rows(alone, together)
    assert products_taken(alone, {}, together) == without_slower_rows(alone, together)


def test_the_fastest_shape_of_attention_for_every_length() -> None:
    small = {**SHAPE, "queries": 16}
    times: list[Any] = [
        Time("attention", 64, "ours", 4, **small),
        Time("attention", 64, "ours", 3, **SHAPE),
        Time("attention", 512, "ours", 60, **small),
    ]
    assert [(each.tokens, each.queries) for each in fastest_attention(times)] == [(64, 64), (512, 16)]


def flex_times(**faster: bool) -> dict[str, Any]:
    """By the number of prompts: whether flex is faster."""
    named = {name[1:]: yes for name, yes in faster.items()}
    return {f"{count} prompts": {"flex": {"ms": 1 if yes else 3}, "sdpa": {"ms": 2}} for count, yes in named.items()}


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (flex_times(_2=False, _8=False, _32=True), 16),
        (flex_times(_2=False, _8=True, _32=True), 4),
        (flex_times(_2=True, _8=True, _32=True), 2),
        (flex_times(_2=True, _8=False, _32=True), 16),
        (flex_times(_2=False, _8=False, _32=False), NEVER),
        ({"64": {"flex": {"ms": 1}, "sdpa": {"ms": 2}}}, None),
    ],
)
def test_from_how_many_lengths_flex_is_faster(times: dict[str, Any], expected: int | None) -> None:
    assert flex_from_lengths(times) == expected


def int8_times(**shares: float | tuple[float, float]) -> dict[str, Any]:
    """By the number of rows: the share that inputs in 8 bits take of the time, or it and that with overlaps."""
    names = "inputs too", "inputs too, overlapping"
    times = {}
    for rows, share in shares.items():
        told = share if isinstance(share, tuple) else (share,)
        times[rows[1:]] = {"weights in 8 bits": 2.0} | {name: 2 * each for name, each in zip(names, told, strict=False)}
    return times


@pytest.mark.parametrize(
    ("times", "expected", "overlapping"),
    [
        (int8_times(_256=0.9, _512=0.6, _1024=0.5), 256, 0),
        (int8_times(_256=0.98, _512=0.6, _1024=0.5), 512, 0),
        (int8_times(_256=0.5, _512=1.2, _1024=0.5), 1024, 0),
        (int8_times(_256=0.5, _512=0.5, _1024=1.0), NEVER, 0),
        (int8_times(_16=(0.99, 0.96), _64=(0.6, 0.5), _256=0.5), 1, 64),
        (int8_times(_16=(0.9, 0.8), _64=(0.6, 0.596), _256=0.5), 1, 16),
        (int8_times(_16=0.5, _64=0.5, _256=0.98), NEVER, 0),
        (int8_times(_16=(0.99, 0.985), _64=(0.6, 0.5), _256=0.5), 64, 0),
        ({}, NEVER, 0),
    ],
)
def test_from_how_many_tokens_inputs_in_8_bits_are_faster(
    times: dict[str, Any], expected: int, overlapping: int
) -> None:
    assert int8_inputs_from(times) == expected
    assert int8_overlapping_rows(times) == overlapping


def finding(**others: Any) -> dict[str, Any]:
    shapes: list[Any] = [Time("attention", 512, "ours", 60, **SHAPE)]
    measured = MeasuredCard.of(RTX, fastest_products(TIMES), fastest_attention(shapes))
    times = {"16": {"before": 1.0, "torch": 0.9, "measured": 0.8}}
    return {"measured": measured.model_dump(mode="json"), "before": "an estimate", "times": times, **others}


def examined(**steps: dict[str, Any]) -> Diagnosis:
    return diagnosis_of("cuda", {**MACHINE, "card": {**CARD, "choice": "an estimate"}}, **steps)


def test_what_is_measured_is_kept_and_read_again() -> None:
    flex = {"times": flex_times(_2=False, _8=True), "wrong": []}
    told = write_choice(examined(kernels={"checked": 9, "wrong": []}, choice=finding(), flex=flex))
    assert str(measured_file(RTX)) in str(told)
    choice = choice_for(RTX)
    assert choice.measured is not None and choice.flex_from_lengths == 4
    assert ways(choice.measured.products)["gated", 256] == "tiles"
    assert [path.name for path in measured_file(RTX).parent.iterdir()] == [measured_file(RTX).name]


def test_flex_stays_as_an_earlier_examination_found_it() -> None:
    flex = {"times": flex_times(_2=False, _8=True), "wrong": []}
    write_choice(examined(kernels={"wrong": []}, choice=finding(), flex=flex))
    write_choice(examined(kernels={"wrong": []}, choice=finding()))
    assert choice_for(RTX).flex_from_lengths == 4
    slower = {"times": flex_times(_2=False, _8=False, _32=True), "wrong": []}
    write_choice(examined(kernels={"wrong": []}, choice=finding(), flex=slower))
    choice_for.cache_clear()
    assert choice_for(RTX).flex_from_lengths == 16


def int8_finding(**others: Any) -> dict[str, Any]:
    times: list[Any] = [Time("gated", 64, "torch", 70), Time("gated", 64, "few rows", 30, **INT8)]
    measured = MeasuredInt8(products=fastest_for_few_rows(times), inputs_from=16, overlapping_rows=64)
    return {"measured": measured.model_dump(mode="json"), "times": int8_times(_64=(0.5, 0.4), _256=0.6), **others}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ({"8-bits": {"wrong": []}, "int8-choice": int8_finding()}, 16),
        ({"8-bits": {"wrong": ["off by 1"]}, "int8-choice": int8_finding()}, None),
        ({"8-bits": {"wrong": []}, "int8-choice": int8_finding(wrong=["off by 1"])}, None),
        ({"int8-choice": int8_finding()}, 512),
        ({}, 512),
    ],
)
def test_inputs_in_8_bits_are_kept_where_they_were_right(steps: dict[str, Any], expected: int | None) -> None:
    """What was found before stays where nothing was examined; what is not kept is told."""
    before = int8_finding()
    before["measured"]["inputs_from"] = 512
    write_choice(examined(**{"kernels": {"wrong": []}, "choice": finding(), "8-bits": {}, "int8-choice": before}))
    assert choice_for(RTX).int8_inputs_from == 512
    told = write_choice(examined(kernels={"wrong": []}, choice=finding(), **steps))
    choice_for.cache_clear()
    assert choice_for(RTX).measured is not None and choice_for(RTX).int8_inputs_from == expected
    assert ("Nothing of int8 was kept" in str(told)) == ("int8-choice" in steps and expected != 16)
    assert [each.configuration for each in choice_for(RTX).int8_products] == ([INT8] if expected else [])


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"choice": finding()}, "kernels: not run"),
        ({"kernels": {"wrong": ["off by 1"]}, "choice": finding()}, "kernels: wrong, choice: ok"),
        ({"kernels": {"wrong": []}, "choice": finding(wrong=["off by 1"])}, "kernels: ok, choice: wrong"),
    ],
)
def test_nothing_is_kept_of_kernels_that_are_not_right(steps: dict[str, Any], message: str) -> None:
    told = write_choice(examined(**steps))
    assert message in str(told) and not measured_file(RTX).exists()


def test_nothing_is_said_where_nothing_was_measured() -> None:
    assert write_choice(examined(kernels={"wrong": []})) is None


def test_a_folder_that_cannot_be_written_is_told() -> None:
    measured_file(RTX).parent.parent.mkdir(parents=True, exist_ok=True)
    measured_file(RTX).parent.write_text("a file")
    told = write_choice(examined(kernels={"wrong": []}, choice=finding()))
    assert "could not be kept" in str(told)


def test_the_report_and_the_command_tell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"start_seconds": 3.0, "first_seconds": 1.5, "second_seconds": 0.004}
    fresh = {"times": {"a later one": times}, "seconds": 4.5}
    choice = finding(lengths={"64": 3.0})
    diagnosis = examined(kernels={"checked": 9, "wrong": []}, choice=choice, **{"first-encode": fresh})
    text = as_markdown(diagnosis)
    assert "| products and attention | an estimate |" in text
    assert "| gated products, 256 rows | tiles block_rows 32" in text and "| 80.0 µs | 100.0 µs |" in text
    assert "layers at 16 tokens: before 1.00 ms, torch 0.90 ms, measured 0.80 ms" in text
    assert "the timed model: 64 tokens 3.00 ms" in text and "The same with" not in text
    assert "| a later one | 3.00 s | 1.50 s | 0.00 s |" in text
    assert "launches overlap" not in text
    choice["measured"]["overlapping_rows"] = 64
    assert "launches overlap up to 64 tokens" in as_markdown(examined(choice=choice))
    monkeypatch.setattr("nai_t5_core.bench.doctor.examine_machine", lambda *_: diagnosis)
    found = CliRunner().invoke(app, ["doctor", "--json"])
    assert found.exit_code == 0, found.output
    assert str(measured_file(RTX)) in json.loads(found.stdout)["kept"]


def test_the_report_tells_what_suits_int8() -> None:
    found = int8_finding(lengths={"64": 2.0})
    text = as_markdown(examined(**{"int8-choice": found}))
    assert "layers at 64 tokens: weights in 8 bits 2.00 ms, inputs too 1.00 ms, inputs too, overlapping 0.80 ms" in text
    assert "| gated products, 64 rows | few rows block_columns 32" in text and "| 30.0 µs | 70.0 µs |" in text
    assert "faster with inputs in 8 bits from 16 tokens on" in text and "the timed model: 64 tokens 2.00 ms" in text
    assert "their launches overlap up to 64 tokens" in text
    found["measured"] |= {"inputs_from": NEVER, "overlapping_rows": 0}
    text = as_markdown(examined(**{"int8-choice": found}))
    assert "layers are not faster with inputs in 8 bits" in text and "launches overlap" not in text
    text = as_markdown(examined(**{"int8-choice": {"reason": "it is AMD's"}}))
    assert "it is AMD's" in text and "The same" not in text
    text = as_markdown(examined(**{"int8-choice": int8_finding(no_lengths="there is no room")}))
    assert "the model was not timed: there is no room" in text


def test_a_model_is_timed_in_int8_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a user's would have to be read anew."""
    measured = MeasuredInt8(inputs_from=16, overlapping_rows=64)
    timed: list[Any] = []
    monkeypatch.setattr(int8_inputs, "named_card", lambda _: RTX)
    monkeypatch.setattr(int8_inputs, "times_of_lengths", lambda *given: timed.append(given) or {"64": 2.0})
    monkeypatch.setattr(int8_inputs, "quantize_int8", lambda stack: stack)
    patient: Any = Patient(DoctorSettings(device="cpu", model="t5-v1_1-small"))
    patient.model.config = TOY_CONFIGS["v1.1"].encoder_only()
    assert int8_inputs._times_of_lengths(patient, measured) == {"lengths": {"64": 2.0}}
    ((_, stack, choice),) = timed
    assert stack.config == patient.config and choice.int8 == measured and choice.card == RTX.name
    given = SimpleNamespace(model=SimpleNamespace(name="a file"))
    assert int8_inputs._times_of_lengths(given, measured) == {}  # type: ignore[arg-type]

    def full(stack: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(int8_inputs, "quantize_int8", full)
    assert "no room for t5-v1_1-small" in int8_inputs._times_of_lengths(patient, measured)["no_lengths"]


def test_the_plan_of_a_card_fits() -> None:
    """Each step has a deadline, and the whole a budget; what is measured for a choice comes before comparisons."""
    steps = {step.name: step for step in all_steps() if "cuda" in step.devices}
    assert all(step.deadline <= 150 for step in steps.values())
    names = list(steps)
    assert names.index("kernels") < names.index("choice") < names.index("transformers") < names.index("compiled")
    assert names.index("8-bits") < names.index("int8-choice") == names.index("choice") + 1
    assert not steps["choice"].only_full and not steps["int8-choice"].only_full and not steps["first-encode"].only_full


# ---------------------------------------------------------------------------------------------------------------------
# The steps themselves
# ---------------------------------------------------------------------------------------------------------------------


def test_ways_are_timed_up_to_their_rows_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """In rounds, of which the fastest counts; what is not right is named."""
    monkeypatch.setattr(choosing, "_ROWS", (16, 64))
    stack: Any = lambda ids: torch.ones(1, ids.shape[1], 4)  # noqa: E731
    stack.config = SimpleNamespace(vocab_size=9)
    milliseconds = iter((3.0, 5.0, 2.0, 6.0, 4.0, 4.5, 9.0, 8.0, 7.0))

    class Way:
        def __init__(self, factor: float) -> None:
            self.factor, self.stack = factor, stack

        def __call__(self, ids: Any) -> Any:
            return self.factor * stack(ids)

    monkeypatch.setattr(own_kernels, "milliseconds_of", lambda *_: next(milliseconds))
    patient: Any = SimpleNamespace(ids=lambda batch, length: torch.zeros(batch, length, dtype=torch.long))
    ways: Any = {"torch": Way(1.0), "overlapping": Way(1.5)}
    times, wrong = choosing._times_together(patient, ways, {"overlapping": 16})
    assert times == {"16": {"torch": 2.0, "overlapping": 4.5}, "64": {"torch": 7.0}}
    assert wrong == ["16 tokens, overlapping: off by 0.5"]


@pytest.mark.skipif(missing_triton() is not None, reason=str(missing_triton()))
def test_launches_that_overlap_are_tried_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    from nai_t5_core.backends.cuda import chosen_products

    hopper = Card("NVIDIA H100", "sm_90")
    monkeypatch.setattr(choosing, "missing_to_overlap", lambda: None)
    monkeypatch.setattr(chosen_products, "HOPPER", TABLE)
    assert choosing._overlapping(RTX, TIMES) == {}
    tried = choosing._overlapping(hopper, TIMES)
    assert list(tried) == ["overlapping", "overlapping, by the table"]
    made: Any = choosing._ways(stack_for_ways(monkeypatch), fastest_products(TIMES), tried, USUAL)
    overlaps = {name: [rows for rows in (16, 32) if products.overlaps(rows, False)] for name, products in made.items()}
    assert overlaps == {"torch": [], "measured": [], "overlapping": [16], "overlapping, by the table": [16]}
    monkeypatch.setattr(choosing, "missing_to_overlap", lambda: "an older Triton")
    assert choosing._overlapping(hopper, TIMES) == {}


def stack_for_ways(monkeypatch: pytest.MonkeyPatch) -> Any:
    """None, where an encoder is no more than its products."""
    monkeypatch.setattr(choosing, "CudaEncoder", lambda _, eager, products, shapes: products)
    return None


@pytest.mark.skipif(missing_triton() is not None, reason=str(missing_triton()))
def test_layers_are_computed_in_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, launch by launch, with times that are given: results are right, and what is kept is valid."""
    from nai_t5_core.backends.cuda.device_refusals import is_interpreted
    from nai_t5_core.bench.doctor import card_times

    if not is_interpreted():
        pytest.skip("Triton's interpreter is off (TRITON_INTERPRET=1)")
    config = TOY_CONFIGS["v1.1"]
    shapes = [Time("attention", tokens, "ours", 1.0, **SHAPE) for tokens in (16, 256)]
    for name, found in {"few_rows": TIMES[:5], "tiles": TIMES[5:], "attention": shapes}.items():
        monkeypatch.setattr(card_times, f"times_of_{name}", lambda *_, found=found: found)
    used = []
    eager = choosing.CudaEncoder

    def encoder(stack: Any, _: bool, products: Any, taken: Any = USUAL) -> Any:
        used.append((products, taken))
        return eager(stack, True, products, taken)

    monkeypatch.setattr(choosing, "CudaEncoder", encoder)
    monkeypatch.setattr(choosing, "card_of", lambda _: RTX)
    monkeypatch.setattr(choosing, "named_config", lambda _: config)
    monkeypatch.setattr(choosing, "_LAYERS", 2)
    monkeypatch.setattr(choosing, "_ROWS", (16, 140))
    of_graphs = iter((3.0, 1.5, 2.0, 1.0, 2.5, 3.0, 2.0, 4.0, 9.0, 9.0, 9.0, 9.0))
    monkeypatch.setattr(own_kernels, "milliseconds_of", lambda *_: next(of_graphs))
    found = choosing.measure_choice(Patient(DoctorSettings(device="cpu")))
    assert found["wrong"] == [] and found["before"].startswith("an estimate")
    measured = MeasuredCard.model_validate_json(json.dumps(found["measured"]))
    assert found["times"] == {"16": {"torch": 2.0, "measured": 1.0}, "140": {"torch": 2.0, "measured": 4.0}}
    assert ways(measured.products)["gated", 16] == "few rows"
    assert used[1][0].tiles.keys() == {("gated", 256)} and used[1][1](16).queries == 64


@pytest.mark.skipif(missing_triton() is not None, reason=str(missing_triton()))
def test_layers_in_int8_are_computed_in_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, without graphs. Launches that overlap are tried up to the rows of our products."""
    from nai_t5_core.backends.cuda.device_refusals import is_interpreted
    from nai_t5_core.backends.cuda.products import Configuration
    from nai_t5_core.bench.doctor import card_times

    if not is_interpreted():
        pytest.skip("Triton's interpreter is off (TRITON_INTERPRET=1)")
    of_int8 = [Time(kind, 32, "torch", 2) for kind in ("plain", "gated")]
    of_int8 += [Time(kind, 32, "few rows", 3, **INT8) for kind in ("plain", "gated")]
    monkeypatch.setattr(card_times, "times_of_int8", lambda _: of_int8)
    used: list[Any] = []
    eager = int8_inputs.CudaEncoder

    def encoder(stack: Any, _: bool, products: Any) -> Any:
        used.append(products)
        return eager(stack, True, products)

    monkeypatch.setattr(int8_inputs, "CudaEncoder", encoder)
    monkeypatch.setattr(int8_inputs, "quantize_int8", lambda stack: quantise_stack(stack, stack.device) or stack)
    monkeypatch.setattr(int8_inputs, "missing_for_8_bits", lambda *_: None)
    monkeypatch.setattr(int8_inputs, "_ROWS", (17, 140))
    told = lambda _, measured: {"lengths": {"64": float(measured.inputs_from)}}  # noqa: E731
    monkeypatch.setattr(int8_inputs, "_times_of_lengths", told)
    monkeypatch.setattr(choosing, "named_config", lambda _: TOY_CONFIGS["v1.1"])
    monkeypatch.setattr(choosing, "_LAYERS", 2)
    of_graphs = iter((2.0, 1.98, 3.0, 2.0, 2.5, 2.5, 4.0, 1.5, 2.0, 1.6, 4.0, 3.0))
    monkeypatch.setattr(own_kernels, "milliseconds_of", lambda *_: next(of_graphs))
    found = int8_inputs.measure_int8_choice(Patient(DoctorSettings(device="cpu")))
    assert found["wrong"] == []
    assert found["times"] == {
        "17": {"weights in 8 bits": 2.0, "inputs too": 1.98},
        "140": {"weights in 8 bits": 2.0, "inputs too": 1.5},
    }
    measured = MeasuredInt8.model_validate_json(json.dumps(found["measured"]))
    assert measured.inputs_from == 140 and measured.overlapping_rows == 0 and found["lengths"] == {"64": 140.0}
    assert [(each.kind, each.way, each.configuration) for each in measured.products] == [
        ("plain", "few rows", INT8),
        ("gated", "few rows", INT8),
    ]
    assert {each.weights for each in measured.products} == {"int8"}
    assert [used[1].int8_configurations[kind, 32][0] for kind in ("plain", "gated")] == [Configuration(**INT8)] * 2
    monkeypatch.setattr(int8_inputs, "card_of", lambda _: Card("NVIDIA H100", "sm_90"))
    monkeypatch.setattr(int8_inputs, "missing_to_overlap", lambda: None)
    ways: Any = int8_inputs._ways(Patient(DoctorSettings(device="cpu")), measured.products)
    assert {name: way.overlaps(32, True, True) for name, way in ways.items()} == {
        "weights in 8 bits": False,
        "inputs too": False,
        "inputs too, overlapping": True,
    }
    assert not ways["inputs too, overlapping"].overlaps(64, True, True)


@pytest.mark.skipif(missing_triton() is not None, reason=str(missing_triton()))
def test_attention_is_timed_for_one_prompt_and_for_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from nai_t5_core.bench.doctor import card_times

    prompts: dict[int, set[tuple[int, int]]] = {}

    def timed(call: Any, rows: Any) -> float:
        table = call.args[1].table
        starts, lengths = table[:, 0].unique(), table[:, 1].unique()
        prompts.setdefault(len(rows[0]), set()).add((len(starts), int(lengths)))
        return 2.0

    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(card_times, "compile_ahead", lambda _: None)
    monkeypatch.setattr(card_times, "_microseconds", timed)
    found = card_times.times_of_attention(RTX, torch.device("cpu"))
    assert {each.rows for each in found} == set(prompts) == set(card_times.ATTENTION_TOKENS)
    assert prompts == {
        tokens: {(1, tokens), (max(1, tokens // 32), min(tokens, 32))} for tokens in card_times.ATTENTION_TOKENS
    }
    shapes = fastest_attention(found)
    assert all(shape.queries == 16 for shape in shapes if shape.tokens <= 32)


@pytest.mark.skipif(missing_triton() is not None, reason=str(missing_triton()))
def test_tiles_that_a_card_has_no_room_for_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one of them would end the step, and nothing would be measured."""
    from triton.runtime.errors import OutOfResources

    from nai_t5_core.backends.cuda.product_times import ProductShape
    from nai_t5_core.bench.doctor import card_times

    def timed(call: Any, *_: Any) -> float:
        if call.func is card_times._by_tiles and call.args[2].block_columns == 256:
            raise OutOfResources(147_456, 101_376, "shared memory")
        return 5.0

    monkeypatch.setattr(card_times, "XXL_SHAPES", (ProductShape("o", "summed", 256, 128),))
    monkeypatch.setattr(card_times, "compile_ahead", lambda _: None)
    monkeypatch.setattr(card_times, "_microseconds", timed)
    found = list(card_times._times_of_tiles(RTX, torch.device("cpu")))
    assert {way for _, _, way, *_ in found} == {"torch", "tiles"}
    assert {how["block_columns"] for *_, how, _ in found if how} == {128}


def test_the_first_encode_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts from when the process was started, here a hundred seconds before it was."""
    monkeypatch.setattr(first_encode, "_PATIENCE", 600)  # on a machine that does much else
    monkeypatch.setattr(fresh_process, "time", SimpleNamespace(time=lambda: time.time() - 100))
    times = first_encode.in_a_fresh_process("t5-v1_1-small", "cpu", 1)
    assert times["start_seconds"] > 100 and times["first_seconds"] > 0 and times["second_seconds"] > 0
    with pytest.raises(RuntimeError, match="t5-gigantic"):
        first_encode.in_a_fresh_process("t5-gigantic", "cpu", 1)


@pytest.mark.skipif(sys.platform == "win32", reason="nothing tells a process there that its parent has ended")
def test_a_process_ends_with_the_one_that_started_it() -> None:
    """As a step does that is killed when its time is over, whose fresh process would go on using the device."""
    start = "from nai_t5_core.bench.doctor.fresh_process import end_with_parent"
    child = f"{start}; end_with_parent(); print(1, flush=True); import time; time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        process.kill()
        # Closed by the last that could write to it.
        assert process.communicate(timeout=60)[0] == b""


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_encode, "_PATIENCE", 0.01)
    with pytest.raises(RuntimeError, match="had not encoded after 0 seconds"):
        first_encode.in_a_fresh_process("t5-v1_1-small", "cpu", 1)


@pytest.mark.skipif(missing_triton() is not None, reason=str(missing_triton()))
def test_a_kernel_that_does_not_compile_leaves_the_others_to_be_compiled() -> None:
    from triton.runtime._async_compile import active_mode

    from nai_t5_core.backends.cuda.graph_times import compile_ahead

    compiled: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def warmup(self, *_: Any, **__: Any) -> None:
            mode: Any = active_mode.get()
            mode.submit(self.name, lambda: 1 / 0 if self.name == "faulty" else self.name, compiled.append)

    with pytest.raises(ZeroDivisionError):
        compile_ahead([(Kernel("faulty"), (), {})])
    assert active_mode.get() is None
    compile_ahead((Kernel(name), (), {}) for name in ("one", "another"))
    assert sorted(compiled) == ["another", "one"] and active_mode.get() is None


def test_a_first_encode_that_is_late_is_told_and_no_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the advice would be to trust nothing that is computed here."""
    times = {"start_seconds": 3.0, "first_seconds": 9.0, "second_seconds": 0.01}
    asked = []
    monkeypatch.setattr(first_encode, "in_a_fresh_process", lambda *given: asked.append(given) or times)
    found = first_encode.time_first_encodes(Patient(DoctorSettings(device="cpu")))
    assert found["seconds"] == 12.0 and [record_at for *_, record_at in asked] == [1, 1, 2]
    diagnosis = examined(**{"first-encode": found})
    assert diagnosis.passed
    assert "Start and first encode are to take at most 10 s, and take 12.0 s." in as_markdown(diagnosis)


def test_an_unknown_way_is_kept_for_later_versions() -> None:
    each = MeasuredProduct(kind="gated", rows=64, weights="int8", way="later", microseconds=1, by_torch=2)
    assert MeasuredProduct.model_validate_json(each.model_dump_json()) == each


def test_nai_t5_by_flex_computes_what_it_does_by_sdpa() -> None:
    peers = pytest.importorskip("nai_t5_core.bench.peers")
    pytest.importorskip("nai_t5", reason="nai-t5 is not installed")
    config = TOY_CONFIGS["v1.1"].encoder_only()
    state = peers.random_state(config)
    ids = torch.arange(20)[None] % config.vocab_size
    with torch.no_grad():
        by_sdpa = peers.nai_t5_encoder(config, state, torch.float32)(ids)
        by_flex = peers.nai_t5_encoder(config, state, torch.float32, flex_length=20)(ids)
    torch.testing.assert_close(by_flex, by_sdpa, atol=1e-4, rtol=1e-4)
