"""Ctrl-C ends a run at once, whatever it does, with one line and no process left; a kill leaves none, either."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("psutil")
if sys.platform == "win32":
    pytest.skip("signals are sent to groups of processes", allow_module_level=True)

import psutil
from toy_captions import captions, write_captions

# Enough that it is tokenized by processes, and in several shards.
COUNT = 60_000
# What there is of the set and how many processes were started when it is pressed, and how many seconds later it is.
MOMENTS: dict[str, tuple[str, int, float]] = {
    "before processes": ("planning.sqlite", 0, 0),
    "as processes start": ("planning.sqlite", 1, 0),
    # Two, and what python starts beside processes.
    "as they tokenize": ("planning.sqlite", 3, 0.4),
    "one encodes": ("shards/00002.safetensors", 0, 0),
    "two start": ("plan.json", 2, 0),
    "two encode": ("shards/00002.safetensors", 2, 0),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = {name: f"{text} {name}" for name, text in captions(COUNT).items()}
    return write_captions(tmp_path_factory.mktemp("captions") / "a.jsonl", texts)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_ends_a_run(moment: str, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    run = run_at(moment, file, out)
    # As a terminal does: to the program and all that it has started.
    os.killpg(run.pid, signal.SIGINT)
    told, _ = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "Traceback" not in told and "stopped: what is complete stays, and running the same command again" in told
    # What python starts beside processes ends by itself, a moment after the program.
    assert not left_of(run)
    assert not (out / "planning.sqlite").exists()


@pytest.mark.parametrize(
    "moment", ["as they tokenize", *(pytest.param(name, marks=pytest.mark.slow) for name in MOMENTS if "two" in name)]
)
def test_no_process_outlives_a_run_that_is_killed(moment: str, file: Path, tmp_path: Path) -> None:
    """The program alone, as the system does when memory ends."""
    run = run_at(moment, file, tmp_path / "set")
    started = psutil.Process(run.pid).children()
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    try:
        assert len(started) >= 2 and not left_of(run)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


def run_at(moment: str, file: Path, out: Path) -> subprocess.Popen[str]:
    """A run that has come to a moment, in a group of its own."""
    command = [sys.executable, "-m", "nai_t5_core.cli", "precompute", str(file), "--id", "id", "--family", "wan"]
    command += ["--device", "cpu", "--out", str(out), "--shard-mb", "4", "--workers", "2" if "two" in moment else "1"]
    run = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Where this process does not hear it, such as in the background, its children would not either.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    there, started, later = MOMENTS[moment]
    while not (out / there).exists() or len(psutil.Process(run.pid).children()) < started:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    time.sleep(later)
    return run


def left_of(run: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of a run that are there still five seconds after it."""
    for _ in range(50):
        if not (left := [one for one in psutil.process_iter() if _is_of(one, run.pid)]):
            break
        time.sleep(0.1)
    return left


def _is_of(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False
