"""Sets up an environment in .venv and runs the project in it; needs Python 3.10 or newer and nothing else.

python3 dev.py demo    encode a prompt with the embedded model, and write the embedding to a file
python3 dev.py test    lint, types and tests
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
BIN = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")


def run(*command: str | Path) -> None:
    """Runs a command of the environment in the project's folder; a fault ends this program with its status."""
    print("$", *command, flush=True)
    status = subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode
    if status:
        sys.exit(status)


def install(extra: str = "") -> None:
    """Installs the project, editable, unless that was done since its requirements last changed."""
    requirements = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    wanted = hashlib.sha256(b"".join(requirements)).hexdigest()
    stamp = ENVIRONMENT / f"installed{extra}"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    if not PYTHON.exists():
        print(f"making an environment in {ENVIRONMENT}", flush=True)
        venv.create(ENVIRONMENT, with_pip=True)
    run(PYTHON, "-m", "pip", "install", "--quiet", "-c", "constraints.txt", "--editable", f".{extra}")
    stamp.write_text(wanted)


def demo() -> None:
    install()
    run(BIN / "nai-t5", "encode", "a photo of a cat", "--out", "cat.safetensors")


def test() -> None:
    install("[test]")
    run(PYTHON, "-m", "ruff", "check", ".")
    run(PYTHON, "-m", "ruff", "format", "--check", ".")
    run(PYTHON, "-m", "mypy")
    run(PYTHON, "-m", "pytest")


COMMANDS = {"demo": demo, "test": test}

if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036 - the one file that an older Python may meet
        sys.exit(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}")
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    COMMANDS[sys.argv[1]]()
