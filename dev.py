"""Sets up an environment in .venv and runs the project in it; needs Python 3.10 or newer and nothing else.

python3 dev.py demo    encode a prompt with the embedded model, and write the embedding to a file
python3 dev.py test    lint, types, and tests
python3 dev.py slow    the tests that take several seconds each, which `test` leaves out
python3 dev.py newest  tests of what concerns other packages, with the newest releases of these, in .venv-newest
python3 dev.py lock    write constraints.txt anew: the releases that demo and test install
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LOCK = ROOT / "constraints.txt"
HELD_BACK = ROOT / "constraints.in"
LOCK_HEADER = """\
# Every release that `dev.py demo` and `dev.py test` install, on Python 3.10 to 3.13. Made by `python3 dev.py lock` from
# pyproject.toml and constraints.in. What CUDA builds of torch bring along is torch's own affair, and not here.
"""
# Packages of torch's CUDA builds; a CPU build has none of them.
CUDA_PACKAGES = ("nvidia-", "cuda-", "triton")
COMPILE_ALL = "import compileall, sysconfig; compileall.compile_dir(sysconfig.get_path('purelib'), quiet=2, workers=0)"


class Environment:
    """A virtual environment in a folder of the project."""

    def __init__(self, name: str) -> None:
        self.folder = ROOT / name
        self.bin = self.folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / ("python.exe" if os.name == "nt" else "python")

    def make(self) -> None:
        if not self.python.exists():
            print(f"making an environment in {self.folder}", flush=True)
            venv.create(self.folder, with_pip=True)

    def pip_install(self, *arguments: str | Path) -> None:
        run(self.python, "-m", "pip", "install", "--quiet", *arguments)

    def install_project(self, extra: str, *arguments: str | Path) -> None:
        """The project, editable, built by the setuptools that is installed and not by the newest one."""
        self.make()
        self.pip_install(*arguments, "setuptools")
        self.pip_install(*arguments, "--no-compile", "--no-build-isolation", "--editable", f".{extra}")
        # pip would compile with one process. What is a template or for other Pythons cannot be compiled and need not.
        run(self.python, "-c", COMPILE_ALL)

    def install_locked(self, extra: str = "") -> None:
        """The project with the releases of constraints.txt, unless that was done since its requirements changed."""
        wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + LOCK.read_bytes()).hexdigest()
        stamp = self.folder / f"installed{extra}"
        if not (stamp.is_file() and stamp.read_text() == wanted):
            self.install_project(extra, "--constraint", LOCK.name)
            stamp.write_text(wanted)


MAIN = Environment(".venv")
NEWEST = Environment(".venv-newest")


def call(*command: str | Path) -> int:
    """Runs a command in the project's folder, and returns its status."""
    print("$", *command, flush=True)
    return subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode


def run(*command: str | Path) -> None:
    """Runs a command in the project's folder; a fault ends this program with its status."""
    status = call(*command)
    if status:
        sys.exit(status)


def demo() -> None:
    MAIN.install_locked()
    run(MAIN.bin / "nai-t5", "encode", "a photo of a cat", "--out", "cat.safetensors")


def workers() -> int:
    """How many processes share the tests: one a processor, each with one thread and about a gigabyte of memory."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, 8)


def pytest(marks: str) -> int:
    """Runs the tests with these marks, and returns pytest's status."""
    shared = ("--numprocesses", str(workers()), "--dist", "worksteal")
    return call(MAIN.python, "-m", "pytest", "-m", marks, *shared)


def test() -> None:
    MAIN.install_locked("[test]")
    run(MAIN.python, "-m", "ruff", "check", ".")
    run(MAIN.python, "-m", "ruff", "format", "--check", ".")
    mypy = [MAIN.python, "-m", "mypy"]
    # Types are checked beside the tests, and told after them.
    types = subprocess.Popen(mypy, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    tests = pytest("not slow")
    said = types.communicate()[0]
    print("$", *mypy)
    print(said, end="", flush=True)
    sys.exit(tests or types.returncode)


def slow() -> None:
    MAIN.install_locked("[test]")
    sys.exit(pytest("slow"))


def newest() -> None:
    """torch stays: it is the largest download, and what depends on its release has tests that take long."""
    torch = next(line for line in HELD_BACK.read_text().splitlines() if line.startswith("torch=="))
    NEWEST.install_project("[test]", "--upgrade", "--upgrade-strategy", "eager", torch)
    run(NEWEST.python, "-m", "tests.newest", "--numprocesses", str(workers()))


def lock() -> None:
    MAIN.make()
    MAIN.pip_install("uv")
    uv = [MAIN.bin / "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.10", "--upgrade"]
    uv += ["--no-config", "--no-header", "--no-annotate", "--constraints", HELD_BACK.name]
    uv += ["pyproject.toml", "--extra", "test"]
    print("$", *uv, flush=True)
    done = subprocess.run([str(part) for part in uv], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    pins = [pin for pin in done.stdout.splitlines(keepends=True) if not pin.startswith(CUDA_PACKAGES)]
    LOCK.write_text(LOCK_HEADER + "".join(pins))
    print(f"{LOCK.name}: {len(pins)} releases", flush=True)


COMMANDS = {"demo": demo, "test": test, "slow": slow, "newest": newest, "lock": lock}

if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036 - the one file that an older Python may meet
        sys.exit(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}")
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    COMMANDS[sys.argv[1]]()
