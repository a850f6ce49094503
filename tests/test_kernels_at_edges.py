"""The kernels' C interface on buffers that end, and begin, where a page or a sanitizer lets nobody pass."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import needs_kernels

from nai_t5_core.backends.kernels import build

pytestmark = needs_kernels

PROGRAM = Path(__file__).with_name("kernels_at_edges.cpp")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def compiled(target: Path, *more: str) -> Path:
    flags = ("-O1", "-g", "-std=c++17", "-fopenmp", f"-I{build._FOLDER}")
    subprocess.run(["g++", *flags, str(PROGRAM), *more, "-o", str(target)], check=True, capture_output=True, text=True)
    return target


@pytest.fixture(scope="module")
def between_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program around the very kernels that models run on."""
    built = Path(build.library()._name)
    return compiled(tmp_path_factory.mktemp("edges") / "pages", str(built), f"-Wl,-rpath,{built.parent}")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [str(build._FOLDER / name) for name in build._SOURCES if name.endswith(".cpp")]
    instructions = [flag for flag in build._FLAGS if flag.startswith("-m")]
    return compiled(tmp_path_factory.mktemp("edges") / "sanitized", *sources, *instructions, *SANITIZERS)


def run(program: Path, seed: int, calls: int, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {"OMP_NUM_THREADS": "2"}
    arguments = [str(program), str(seed), str(calls), *words]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)


def test_nothing_is_touched_beside_a_buffer(between_pages: Path, record_property: Any) -> None:
    done = run(between_pages, 1, 500, "pages")
    assert (done.returncode, done.stdout) == (0, "500 calls\n"), done.stderr
    record_property("calls of the kernels between pages that nobody may touch", 500)


def test_a_buffer_that_is_too_short_is_noticed_by_pages(between_pages: Path) -> None:
    ends = {run(between_pages, seed, 20, "pages", "short").returncode for seed in range(3)}
    assert ends == {-signal.SIGSEGV}


@pytest.mark.slow
def test_sanitizers_find_nothing(sanitized: Path, record_property: Any) -> None:
    """Neither AddressSanitizer nor UndefinedBehaviourSanitizer, in the kernels' own memory as well."""
    done = run(sanitized, 2, 2000, "heap")
    assert (done.returncode, done.stdout) == (0, "2000 calls\n"), done.stderr[:3000]
    record_property("calls of the kernels with sanitizers", 2000)
    short = run(sanitized, 2, 20, "heap", "short")
    assert short.returncode and "ERROR: AddressSanitizer" in short.stderr
