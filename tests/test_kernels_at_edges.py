"""The kernels' C interface on buffers that end, and begin, where a page or a sanitizer lets nobody pass."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import set_param

from nai_t5_core.backends.kernels.build import library
from nai_t5_core.backends.kernels.compilers import FOLDER
from nai_t5_core.backends.kernels.sets import SETS, InstructionSet

PROGRAM = Path(__file__).with_name("kernels_at_edges.cpp")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module", params=[set_param(instructions) for instructions in SETS])
def instructions(request: pytest.FixtureRequest) -> InstructionSet:
    found: InstructionSet = request.param
    return found


def compiled(target: Path, *more: str) -> Path:
    flags = ("-O1", "-g", "-std=c++17", "-fopenmp", f"-I{FOLDER}")
    subprocess.run(["g++", *flags, str(PROGRAM), *more, "-o", str(target)], check=True, capture_output=True, text=True)
    return target


@pytest.fixture(scope="module")
def between_pages(instructions: InstructionSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program around the very kernels that models run on."""
    built = Path(library(instructions)._name)
    return compiled(tmp_path_factory.mktemp("edges") / "pages", str(built), f"-Wl,-rpath,{built.parent}")


@pytest.fixture(scope="module")
def sanitized(instructions: InstructionSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = instructions.recipe
    return compiled(
        tmp_path_factory.mktemp("edges") / "sanitized", *map(str, recipe.units), *recipe.arguments, *SANITIZERS
    )


def run(
    program: Path, instructions: InstructionSet, seed: int, calls: int, memory: str, *fault: str
) -> subprocess.CompletedProcess[str]:
    environment = {"OMP_NUM_THREADS": "2"}
    activations = "both" if torch.bfloat16 in instructions.stored.values() else "float32"
    arguments = [str(program), str(seed), str(calls), memory, activations, *fault]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)


def test_nothing_is_touched_beside_a_buffer(
    between_pages: Path, instructions: InstructionSet, record_property: Any
) -> None:
    done = run(between_pages, instructions, 1, 500, "pages")
    assert (done.returncode, done.stdout) == (0, "500 calls\n"), done.stderr
    record_property(f"calls of the kernels for {instructions.title} between pages that nobody may touch", 500)


def test_a_buffer_that_is_too_short_is_noticed_by_pages(between_pages: Path, instructions: InstructionSet) -> None:
    ends = {run(between_pages, instructions, seed, 20, "pages", "short").returncode for seed in range(3)}
    assert ends == {-signal.SIGSEGV}


@pytest.mark.slow
def test_sanitizers_find_nothing(sanitized: Path, instructions: InstructionSet, record_property: Any) -> None:
    """Neither AddressSanitizer nor UndefinedBehaviourSanitizer, in the kernels' own memory as well."""
    done = run(sanitized, instructions, 2, 2000, "heap")
    assert (done.returncode, done.stdout) == (0, "2000 calls\n"), done.stderr[:3000]
    record_property(f"calls of the kernels for {instructions.title} with sanitizers", 2000)
    short = run(sanitized, instructions, 2, 20, "heap", "short")
    assert short.returncode and "ERROR: AddressSanitizer" in short.stderr
