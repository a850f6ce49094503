"""The comparison on diffusers' own tests compares: its plugin puts our encoder in, and a smaller run is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import upstream_diffusers as upstream
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


@pytest.mark.skip
class TestForAnAccelerator:
    def test_skipped(self):
        pass
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "tests" / "pipelines" / "toy"
    folder.mkdir(parents=True)
    (folder / "test_toy.py").write_text(TEST_FILE)
    return tmp_path


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
    assert [test.rpartition("::")[2] for test in upstream.lost_tests(stock, ours)] == [
        "test_that_wants_theirs (failure)"
    ]


def test_a_run_without_our_encoder_is_an_error(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"pytest ended with {NOTHING_PLACED}"):
        upstream.run(checkout, ["toy/test_toy.py::TestWithoutParts"], tmp_path, swap=True)
    skipped = upstream.run(checkout, ["toy/test_toy.py::TestForAnAccelerator"], tmp_path, swap=True)
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
    two = {"a": "passed", "b": "passed", "c": "failure"}
    assert upstream.too_few("flux", two) == []
    assert upstream.too_few("flux", two | {"b": "error"}) == [
        "flux: 1 pass with theirs, 2 are known to; see b (error); c (failure)"
    ]
    assert upstream.too_few("wan", two) == ["wan: 2 pass with theirs; write that down in KNOWN"]
