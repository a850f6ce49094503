"""Loading in fresh processes: real children, and the report with made-up ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS

import nai_t5_core
from nai_t5_core.bench.children import START, run_child
from nai_t5_core.bench.parity_report import OWN
from nai_t5_core.bench.peers import random_state
from nai_t5_core.bench.speed import loading, markdown, run_bench

V1_1 = TOY_CONFIGS["v1.1"].encoder_only()
HAS_PROC = Path("/proc/self/statm").exists()


@pytest.fixture(scope="module")
def contenders(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("loading")
    return loading._contenders(folder, V1_1, random_state(V1_1), torch.float32, threads=1)


def test_children_load_and_embed(contenders: list[Any]) -> None:
    """One real process of each sort."""
    converted, from_folder = contenders[0], next(item for item in contenders if "folder" in item.name)
    timed = run_child(START + converted.code + loading._TIMED, converted.arguments)
    assert set(timed) == {"total", "imports", "load", "first"}
    assert timed["total"] > timed["imports"] + timed["load"] + timed["first"] > 0
    if HAS_PROC:
        weighed = run_child(START + from_folder.code + loading._WEIGHED, from_folder.arguments)
        assert weighed["first"]["anonymous"] >= weighed["load"]["anonymous"]
        assert weighed["first"]["peak"] >= weighed["load"]["peak"]


def test_children_run_the_code_that_started_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed, and wherever they are started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    code = 'import nai_t5_core; print(json.dumps({"file": nai_t5_core.__file__, "path": sys.path}))'
    found = run_child(START + code, {"threads": 1, "ids": []})
    assert found["file"] == nai_t5_core.__file__
    # Its rooms have names that libraries have, too.
    assert str(Path(nai_t5_core.__file__).parent) not in found["path"]


def test_a_child_that_fails_is_quoted() -> None:
    with pytest.raises(RuntimeError, match="no such weights"):
        run_child("raise SystemExit('no such weights')", {})


def test_whole_loading_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the children, whose figures are made up here."""

    def made_up(code: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if "def peaks" in code:
            figures = {"peak": 300_000, "anonymous": 200_000}
            return {"load": figures, "first": {**figures, "peak": 10**9}, "can_reset": True, "total": 1.0}
        phases = {"imports": 1.0, "load": 0.5, "first": 0.25} if "def load" in code else {}
        return {"total": 4.0 if "import transformers" in code else 2.0, **phases}

    monkeypatch.setattr(loading, "run_child", made_up)
    report = run_bench(V1_1, "float32", device="cpu", repeats=3, cases=())
    found = report.loading
    assert found is not None
    state = random_state(V1_1)
    assert found.weights == sum(tensor.nbytes for tensor in state.values())
    assert found.work_space == 4 * V1_1.d_model * 3 * V1_1.inner_dim
    names = [item.name for item in found.cold_starts]
    assert names[:2] == [f"{OWN}, converted file", f"{OWN}, Hugging Face folder"]
    if HAS_PROC:
        assert [item.holds for item in found.memory] == [False] * len(found.memory)
        assert len({item.name for item in found.memory}) >= len(names)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert {item["name"] for item in values["loading"]["cold_starts"]} == set(names)
    assert all(item["holds"] is False for item in values["loading"]["memory"])
    assert "| import torch alone | 2.00 s" in markdown(report)
