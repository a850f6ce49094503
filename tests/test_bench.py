"""The benchmark on toys: complete, finite, and comparing the same mathematics. No absolute times."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS

from nai_t5_core import bench, bench_load
from nai_t5_core.bench import CASES, EAGER, Case, markdown, render, run_bench
from nai_t5_core.bench_report import BenchReport
from nai_t5_core.encoder import T5EncoderStack
from nai_t5_core.optimize import can_prepack
from nai_t5_core.parity_report import OWN
from nai_t5_core.peers import random_state

V1_1 = TOY_CONFIGS["v1.1"].encoder_only()
SMALL_CASES = tuple(
    Case(case.name, tuple(min(length, 40) for length in case.prompt_lengths), min(case.length, 48), case.padding)
    for case in CASES
)
CAN_PREPACK = can_prepack(T5EncoderStack(V1_1, dtype=torch.float32))
HAS_PROC = Path("/proc/self/statm").exists()


def small_bench(**arguments: Any) -> BenchReport:
    return run_bench(
        V1_1,
        **{"dtype": "float32", "device": "cpu", "repeats": 3, "cases": SMALL_CASES, "with_load": False, **arguments},
    )


@pytest.fixture(scope="module")
def report() -> BenchReport:
    pytest.importorskip("transformers", reason="a peer to measure")
    pytest.importorskip("nai_t5", reason="a peer to measure")
    return small_bench()


def test_every_case_and_implementation_is_measured(report: BenchReport) -> None:
    assert [result.case for result in report.cases] == list(SMALL_CASES)
    own = {OWN, EAGER} if CAN_PREPACK else {OWN}
    for result in report.cases:
        assert set(result.seconds) == {*own, "transformers", "nai-t5"}
        assert set(result.ratios) == set(result.seconds) - {OWN}
        for spread in [*result.seconds.values(), *result.ratios.values()]:
            assert all(math.isfinite(value) and value > 0 for value in (spread.low, spread.median, spread.high))
            assert spread.low <= spread.high


def test_all_compute_the_same(report: BenchReport) -> None:
    for result in report.cases:
        assert max(result.differences.values()) < 1e-5, result.case.name


def test_json_holds_everything(report: BenchReport) -> None:
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [result["case"]["name"] for result in values["cases"]] == [case.name for case in CASES]
    assert set(values["versions"]) == {"torch", "transformers", "nai-t5"}
    assert (values["dtype"], values["repeats"], values["loading"]) == ("float32", 3, None)
    assert values["threads"] == torch.get_num_threads()


def test_ratio_is_theirs_over_ours() -> None:
    spread = bench._ratio([2.0, 6.0, 4.0], [1.0, 2.0, 4.0])
    assert (spread.median, spread.low, spread.high) == (2.0, 1.0, 3.0)


def test_implementations_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def encoder(name: str) -> Any:
        def encode(case: Case, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            turns.append(name)
            return torch.ones(*ids.shape, 2)

        return encode

    monkeypatch.setattr(bench, "_encoders", lambda *_: {name: encoder(name) for name in (OWN, "b", "c")})
    small_bench(cases=SMALL_CASES[:1], repeats=2)
    assert turns == [OWN, "b", "c"] * 4


def test_own_figures_only_and_peers_that_cannot() -> None:
    case = SMALL_CASES[:1]
    alone = small_bench(peers=(), cases=case)
    assert all(name.startswith(OWN) for name in alone.cases[0].seconds)
    pytest.importorskip("nai_t5", reason="a peer that has no float64")
    wide = small_bench(peers=("nai-t5",), cases=case, dtype="float64")
    assert list(wide.cases[0].seconds) == [OWN]
    assert wide.skipped == ("nai-t5: nai-t5 has no float64: its norms and residual are float32",)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    assert small_bench(threads=1, peers=(), cases=SMALL_CASES[:1]).threads == 1
    assert torch.get_num_threads() == before


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="unknown peers"):
        small_bench(peers=("keras",))
    with pytest.raises(ValueError, match="repeats=0"):
        small_bench(repeats=0)
    with pytest.raises(ValueError, match="did you mean 't5-v1_1-small'"):
        run_bench("t5-v1_1-smal")


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contenders(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("loading")
    return bench_load._contenders(folder, V1_1, random_state(V1_1), torch.float32, threads=1)


def test_children_load_and_embed(contenders: list[Any]) -> None:
    """One real process of each sort."""
    converted, from_folder = contenders[0], next(item for item in contenders if "folder" in item.name)
    timed = bench_load._run_child(bench_load._START + converted.code + bench_load._TIMED, converted.arguments)
    assert set(timed) == {"total", "imports", "load", "first"}
    assert timed["total"] > timed["imports"] + timed["load"] + timed["first"] > 0
    if HAS_PROC:
        weighed = bench_load._run_child(
            bench_load._START + from_folder.code + bench_load._WEIGHED, from_folder.arguments
        )
        assert weighed["first"]["anonymous"] >= weighed["load"]["anonymous"]
        assert weighed["first"]["peak"] >= weighed["load"]["peak"]


def test_a_child_that_fails_is_quoted() -> None:
    with pytest.raises(RuntimeError, match="no such weights"):
        bench_load._run_child("raise SystemExit('no such weights')", {})


def test_whole_loading_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the children, whose figures are made up here."""

    def made_up(code: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if "def peaks" in code:
            figures = {"peak": 300_000, "anonymous": 200_000}
            return {"load": figures, "first": {**figures, "peak": 10**9}, "can_reset": True, "total": 1.0}
        phases = {"imports": 1.0, "load": 0.5, "first": 0.25} if "def load" in code else {}
        return {"total": 4.0 if "import transformers" in code else 2.0, **phases}

    monkeypatch.setattr(bench_load, "_run_child", made_up)
    report = small_bench(cases=SMALL_CASES[:1], peers=(), with_load=True)
    loading = report.loading
    assert loading is not None
    state = random_state(V1_1)
    assert loading.weights == sum(tensor.nbytes for tensor in state.values())
    assert loading.work_space == 4 * V1_1.d_model * 3 * V1_1.inner_dim
    names = [item.name for item in loading.cold_starts]
    assert names[:2] == [f"{OWN}, converted file", f"{OWN}, Hugging Face folder"]
    if HAS_PROC:
        assert [item.holds for item in loading.memory] == [False] * len(loading.memory)
        assert len({item.name for item in loading.memory}) >= len(names)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert {item["name"] for item in values["loading"]["cold_starts"]} == set(names)
    assert all(item["holds"] is False for item in values["loading"]["memory"])
    assert "| import torch alone | 2.00 s" in markdown(report)


def test_pages_for_people(report: BenchReport) -> None:
    from rich.console import Console

    narrow, page = io.StringIO(), io.StringIO()
    Console(file=narrow, width=80).print(render(report))
    assert "…" not in narrow.getvalue()
    Console(file=page, width=250).print(render(report))
    for text in (OWN, "transformers", "nai-t5", *(case.name for case in CASES)):
        assert text in page.getvalue()
        assert text in markdown(report)
    rows = [line for line in markdown(report).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(CASES)
    assert len({row.count("|") for row in rows}) == 1
