"""The kernels where there is no g++, no OpenMP, or no Linux."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import set_param

from nai_t5_core.backends.kernels.compilers import FOLDER, GXX, ZIG, ZIG_FOR_WINDOWS, Compiler
from nai_t5_core.backends.kernels.sets import SETS, InstructionSet

ROOT = Path(__file__).parent.parent
PROGRAM = Path(__file__).with_name("kernels_beside_reference.cpp")
WINE = next((path for name in ("wine64", "/usr/lib/wine/wine64", "wine") if (path := shutil.which(name))), None)
WITHOUT_OPENMP = Compiler("g++ without OpenMP", ("g++",))
FAST_ENOUGH = ("-O1",)


@pytest.fixture(scope="module", params=[set_param(instructions) for instructions in SETS])
def instructions(request: pytest.FixtureRequest) -> InstructionSet:
    found: InstructionSet = request.param
    return found


def program(compiler: Compiler, instructions: InstructionSet, target: Path, *more: str) -> Path:
    """The program around a set's kernels, compiled with them."""
    kinds = ["-DWITH_BFLOAT16"] if torch.bfloat16 in instructions.stored.values() else []
    recipe = instructions.recipe
    sources = [str(PROGRAM), *(more or map(str, recipe.units))]
    system = ("-target", "x86_64-windows-gnu") if compiler.for_windows else ("-pthread",)
    command = [*compiler.command, *system, *FAST_ENOUGH, "-std=c++17", *kinds, *recipe.arguments, *sources]
    subprocess.run([*command, "-o", str(target)], check=True, capture_output=True, text=True)
    return target


def is_right(done: subprocess.CompletedProcess[str]) -> None:
    told = done.stdout.splitlines()
    wrong = [line for line in told if "WRONG" in line]
    assert done.returncode == 0 and not wrong and told[-1] == "all good", (
        wrong,
        done.stdout[-500:],
        done.stderr[-2000:],
    )


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", [(), ("-fsanitize=thread",)], ids=["plain", "threads watched"])
def test_threads_of_our_own(sanitizers: tuple[str, ...], instructions: InstructionSet, tmp_path: Path) -> None:
    units = [*map(str, instructions.recipe.units), *sanitizers]
    made = program(WITHOUT_OPENMP, instructions, tmp_path / "program", *units)
    is_right(subprocess.run([str(made)], capture_output=True, text=True, check=False))


# One block by the library that is named, in several threads at once, after a fork, and with other numbers of threads.
CALLS = """
import ctypes, os, sys, threading
import torch
from nai_t5_core.backends.kernels import interface
from nai_t5_core.backends.kernels.calls import normed_product
from nai_t5_core.backends.kernels.sets import named
from nai_t5_core.backends.kernels.weights import KernelWeight

instructions, library = named(sys.argv[1]), ctypes.CDLL(sys.argv[2])
interface.library = lambda _: library
numbers = torch.randn(96, 64)
weight = KernelWeight.plain(numbers, torch.float32, instructions=instructions)
x = torch.randn(50, 64)
product = lambda: normed_product(x, None, 1e-6, weight)
torch.set_num_threads(1)
expected = product()
close = torch.nn.functional.rms_norm(x, (64,), eps=1e-6) @ numbers.T
torch.testing.assert_close(expected, close)
for threads in (3, 1, 8):
    torch.set_num_threads(threads)
    assert torch.equal(product(), expected)
    assert library.t5_threads() == threads, library.t5_threads()
wrong = []
callers = [threading.Thread(target=lambda: wrong.extend(not torch.equal(product(), expected) for _ in range(300)))
           for _ in range(4)]
[caller.start() for caller in callers]
[caller.join() for caller in callers]
assert len(wrong) == 1200 and not any(wrong)
child = os.fork()
if child == 0:
    os._exit(0 if all(torch.equal(product(), expected) for _ in range(20)) else 1)
assert os.waitpid(child, 0)[1] == 0
print("right", library.t5_has_own_threads())
"""


def called(instructions: InstructionSet, library: Path) -> str:
    arguments = [sys.executable, "-c", CALLS, instructions.name, str(library)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [WITHOUT_OPENMP, ZIG], ids=lambda compiler: compiler.name)
def test_a_library_without_openmp(compiler: Compiler, instructions: InstructionSet, tmp_path: Path) -> None:
    if not compiler.is_there:
        pytest.skip(f"{compiler.name} is not installed")
    built = tmp_path / compiler.file_name(instructions.recipe)
    compiler.build(instructions.recipe, built)
    assert called(instructions, built) == "right 1"


@pytest.mark.slow
@pytest.mark.skipif(not ZIG.is_there, reason="the package ziglang is not installed, which compiles for Windows")
@pytest.mark.skipif(WINE is None, reason="wine is not installed, which runs what is compiled for Windows")
def test_on_windows(instructions: InstructionSet, tmp_path: Path) -> None:
    """The very file that Python would load there, behind a program that calls all of it."""
    library = tmp_path / ZIG_FOR_WINDOWS.file_name(instructions.recipe)
    ZIG_FOR_WINDOWS.build(instructions.recipe, library)
    made = program(ZIG_FOR_WINDOWS, instructions, tmp_path / "program.exe", str(library))
    environment = {**os.environ, "WINEDEBUG": "-all", "WINEPREFIX": str(tmp_path / "wine")}
    command = [str(WINE), str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    is_right(done)


@pytest.mark.slow
@pytest.mark.skipif(not GXX.is_there, reason="there is no g++")
def test_a_wheel_brings_them(tmp_path: Path) -> None:
    """They are found where nothing can be compiled."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.rpartition("-")[2].startswith("linux") and "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    brought = tmp_path / "site" / FOLDER.relative_to(ROOT) / "brought"
    assert {file.name for file in brought.iterdir()} == {GXX.file_name(each.recipe) for each in SETS}
    code = (
        "from nai_t5_core.backends.kernels.build import built_file, prepare_kernels\n"
        "import torch\n"
        "from nai_t5_core.backends.kernels.sets import SETS\n"
        "from nai_t5_core import TextEncoder\n"
        "assert not prepare_kernels(), prepare_kernels()\n"
        "TextEncoder.from_pretrained(None, dtype='float32').encode(['a cat'])\n"
        "print(*map(built_file, SETS))\n"
    )
    environment: dict[str, Any] = {**os.environ, "PATH": "", "PYTHONPATH": str(tmp_path / "site")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0 and done.stdout.count(str(brought)) == len(SETS), (done.stdout, done.stderr)
    assert not (tmp_path / "cache").exists()
