"""Damaged files of every kind, a few of each: the short run of ``tests/fuzz.py``, and what once failed there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_readers import readers
from hostile import in_little

FUZZ = Path(__file__).parent / "fuzz.py"
EXAMPLES = 1_600
# In a folder for each reader, the file that it read.
DAMAGED = Path(__file__).parent / "damaged"
FAILED = sorted(path for path in DAMAGED.rglob("*") if path.is_file())
# What is odd in these does no harm.
READ_NOW = {
    DAMAGED / "GGUF" / "model-list.gguf",
    DAMAGED / "adapter_config.json" / "pattern-without-end.json",
    DAMAGED / "special_tokens_map.json" / "surrogate.json",
    DAMAGED / "spiece.model" / "charsmap-number.model",
    DAMAGED / "training config" / "no-such-user.toml",
}


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


@pytest.mark.parametrize("file", FAILED, ids=lambda file: f"{file.parent.name}: {file.stem}")
def test_what_once_failed(file: Path, tmp_path: Path) -> None:
    """Each raised another error, took seconds or filled the memory; now it is read, or refused as documented."""
    if file.suffix == ".gguf":
        pytest.importorskip("gguf", reason="reading GGUF files needs the package gguf")
    reader = readers()[file.parent.name]
    reader.write(tmp_path, file.read_bytes())
    refused = False
    with in_little():
        try:
            reader.read(tmp_path)
        except (ValueError, OSError):
            refused = True
    assert refused == (file not in READ_NOW)
