"""The comparison on diffusers' own tests compares: its plugin puts our encoder in, and a smaller run is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import typer
import upstream_diffusers as upstream
import upstream_rounding
from upstream_swap import NOTHING_PLACED

TEST_FILE = """
import inspect
import unittest

import pytest
from toy_parts import text_encoder


class Config:
    def get_dummy_components(self, num_layers=1):
        return {"text_encoder": text_encoder(), "vae": None}


class TestPlain(Config):
    @pytest.fixture(scope="class")
    def from_a_fixture(self):
        return self.get_dummy_components()["text_encoder"]

    def test_of_a_class(self, from_a_fixture):
        assert type(from_a_fixture).__name__ == "NAIT5EncoderModel"

    def test_that_looks_at_the_parameters(self):
        assert list(inspect.signature(self.get_dummy_components).parameters) == ["num_layers"]

    def test_that_wants_theirs(self):
        assert type(self.get_dummy_components()["text_encoder"]).__name__ == "T5EncoderModel"


class OfUnittest(Config, unittest.TestCase):
    def test_of_a_case(self):
        self.assertEqual(type(self.get_dummy_components()["text_encoder"]).__name__, "NAIT5EncoderModel")


@pytest.mark.skip
class TestMarked(Config):
    def test_with_the_mark_of_its_class(self):
        pass


class TestWithoutParts:
    def test_untouched(self):
        pass
"""

# Takes less time to import.
FILE_WITHOUT_PARTS = """
import pytest


class TestWithoutParts:
    def test_untouched(self):
        pass


@pytest.mark.skip
class TestForAnAccelerator:
    def test_skipped(self):
        pass
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "tests" / "pipelines" / "toy"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "test_toy.py").write_text(TEST_FILE)
    (folder / "test_without_parts.py").write_text(FILE_WITHOUT_PARTS)
    return tmp_path


@pytest.mark.slow
def test_our_encoder_is_in_place_in_every_kind_of_class(checkout: Path, tmp_path: Path) -> None:
    """Both pytest's plain classes and unittest's, through fixtures and without."""
    files = ["toy/test_toy.py"]
    stock, ours = (upstream.run(checkout, files, tmp_path, swap) for swap in (False, True))
    assert {test.rpartition("::")[2] for test in ours if ours[test] == "passed"} == {
        "test_of_a_class",
        "test_of_a_case",
        "test_that_looks_at_the_parameters",
        "test_untouched",
    }
    assert {test.rpartition("::")[2] for test in stock if stock[test] == "passed"} == {
        "test_that_looks_at_the_parameters",
        "test_that_wants_theirs",
        "test_untouched",
    }
    lost = upstream.lost_tests(stock, ours)
    assert [test.rpartition("::")[2] for test in lost] == ["test_that_wants_theirs"]
    assert ours[lost[0]].startswith("failure: AssertionError: assert 'NAIT5EncoderModel' == 'T5EncoderModel'")


@pytest.mark.slow
def test_a_run_without_our_encoder_is_an_error(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"pytest ended with {NOTHING_PLACED}"):
        upstream.run(checkout, ["toy/test_without_parts.py::TestWithoutParts"], tmp_path, swap=True)
    skipped = upstream.run(checkout, ["toy/test_without_parts.py::TestForAnAccelerator"], tmp_path, swap=True)
    assert list(skipped.values()) == ["skipped"]


def test_every_file_that_makes_a_t5_is_found(checkout: Path) -> None:
    """In the file itself, or in the package for all of its tests."""
    pipelines = checkout / "tests" / "pipelines"
    for name, source in {
        "toy/test_umt5.py": "from transformers import UMT5EncoderModel",
        "toy/test_config_alone.py": "from transformers import T5Config",
        "deepfloyd/__init__.py": "T5EncoderModel(config)",
        "deepfloyd/test_if.py": "",
        "other/__init__.py": "",
        "other/test_clip.py": "CLIPTextModel",
        "whole/test_whole.py": "T5ForConditionalGeneration",
    }.items():
        (pipelines / name).parent.mkdir(exist_ok=True)
        (pipelines / name).write_text(source)
    for package in ("toy", "whole"):
        (pipelines / package / "__init__.py").touch()
    assert upstream.files_with_a_t5(checkout) == {
        "deepfloyd": ["deepfloyd/test_if.py"],
        "toy": ["toy/test_toy.py", "toy/test_umt5.py"],
        "whole": ["whole/test_whole.py"],
    }


def test_fewer_passes_with_theirs_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "KNOWN", {"flux": 2})
    two = {"a": "passed", "b": "passed", "c": "failure: 1 != 2"}
    assert upstream.too_few("flux", two) == []
    assert upstream.too_few("flux", two | {"b": "error: no file"}) == [
        "flux: 1 pass with theirs, 2 are known to; see b (error: no file); c (failure: 1 != 2)"
    ]
    assert upstream.too_few("wan", two) == ["wan: 2 pass with theirs; write that down in KNOWN"]


@pytest.mark.parametrize("test", upstream_rounding.DECIDED_BY_ROUNDING)
def test_what_rounding_decides_is_neither_a_fault_nor_a_pass(test: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With either encoder, in either wording, up to the difference that was seen with theirs."""
    known = upstream_rounding.DECIDED_BY_ROUNDING[test]
    monkeypatch.setattr(upstream, "KNOWN", {"toy": 1})
    for measured in (
        f"failure: assert np.float32({known.largest}) < 0.0001",
        f"failure: AssertionError: np.float32({known.largest}) not less than 0.0005",
    ):
        lost = {test: measured}
        assert upstream.faults_of_ours({test: "passed"}, lost) == []
        assert upstream.too_few("toy", lost) == []
        assert upstream.passed(lost) == 0
        assert upstream.difference({test: "passed"}, lost) == "theirs 1, ours 0"
        (line,) = upstream_rounding.explain_rounding(lost, "ours")
        assert test in line and measured in line and known.why in line


@pytest.mark.parametrize("test", upstream_rounding.DECIDED_BY_ROUNDING)
@pytest.mark.parametrize(
    "outcome",
    [
        "failure: assert np.float32(0.001) < 0.0001",
        "failure: AssertionError: np.float32(nan) not less than 0.0005",
        "failure: AttributeError: no save_pretrained",
        "error: np.float32(0.0001)",
        "skipped",
        None,
    ],
)
def test_any_other_end_of_such_a_test_is_a_fault(test: str, outcome: str | None) -> None:
    ours = {} if outcome is None else {test: outcome}
    assert upstream.faults_of_ours({test: "passed"}, ours) == [f"passes with theirs only: {test} ({outcome})"]
    assert upstream_rounding.explain_rounding(ours, "ours") == []


def test_the_same_failure_of_another_test_is_a_fault() -> None:
    stock, ours = {"other": "passed"}, {"other": "failure: assert np.float32(0.00011) < 0.0001"}
    assert len(upstream.faults_of_ours(stock, ours)) == 1


def test_the_status_is_0_for_rounding_and_1_for_a_fault(
    monkeypatch: pytest.MonkeyPatch, checkout: Path, capsys: Any
) -> None:
    """The whole tool: rounding is told and ends with 0, anything else with 1."""
    name = next(iter(upstream_rounding.DECIDED_BY_ROUNDING))
    monkeypatch.setattr(upstream, "KNOWN", {"toy": 1})
    for measured, status in (("0.00051", 0), ("0.51", 1)):
        end = f"failure: AssertionError: np.float32({measured}) not less than 0.0005"
        monkeypatch.setattr(upstream, "run", lambda *given, end=end: {name: end if given[-1] else "passed"})
        with pytest.raises(typer.Exit) as stopped:
            upstream.main(checkout, ["toy"])
        printed = capsys.readouterr().out
        assert stopped.value.exit_code == status
        assert ("decided by rounding" in printed, "passes with theirs only" in printed) == (status == 0, status == 1)
        assert "| toy | 1 | 0 | theirs 1, ours 0 |" in printed
