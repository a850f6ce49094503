"""Damaged files of every kind, a few of each: the short run of ``tests/fuzz.py``, and what once failed there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz.py"
EXAMPLES = 1_600


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is bounded as Linux does it")
def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    """In a process of its own, whose memory is bounded, and which a parser may take down."""
    pytest.importorskip("gguf", reason="reading GGUF files needs the package gguf")
    command = [sys.executable, str(FUZZ), "--same", "--json", "--examples", str(EXAMPLES), "--keep", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.stdout, run.stderr[-2000:]
    table = json.loads(run.stdout)
    assert {name: found["undocumented"] for name, found in table.items() if found["undocumented"]} == {}
    assert run.returncode == 0
    # Damage that every reader refuses at its first check would show nothing, and so would damage that none notices.
    assert sum(found["inputs"] for found in table.values()) >= 0.9 * EXAMPLES
    assert all(found["refused"] for found in table.values())
    assert sum(found["read"] > 0 for found in table.values()) > 0.8 * len(table)
