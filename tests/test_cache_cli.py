"""``encode --cache-dir`` and the commands for what it has kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from test_cli import Run, no_terminal, run  # noqa: F401

ON_CPU = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture
def kept(run: Run, tmp_path: Path) -> Path:  # noqa: F811
    """A cache of two prompts."""
    folder = tmp_path / "cache"
    assert run("encode", "a cat", "two dogs", *ON_CPU, "--cache-dir", folder).status == 0
    return folder


def test_the_second_time_nothing_is_loaded(run: Run, kept: Path) -> None:  # noqa: F811
    plain = run("encode", "a cat", "two dogs", *ON_CPU, "--json").json
    again = run("encode", "two dogs", "a cat", *ON_CPU, "--cache-dir", kept, "--json").json
    assert (plain["loaded"], again["loaded"]) == (True, False)
    assert again["prompts"][::-1] == plain["prompts"]
    assert again["source"] == plain["source"]
    assert run("encode", "a fox", *ON_CPU, "--cache-dir", kept, "--json").json["loaded"]


@pytest.mark.parametrize("kind", ["of another user", "a file"])
def test_a_folder_that_cannot_be_used_costs_nothing_but_the_cache(
    kind: str,
    run: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "cache"
    if kind == "a file":
        folder.write_text("something else")
    else:
        folder.mkdir()
        # What the system answers to all but root, who may read everything.
        may = os.access
        monkeypatch.setattr(os, "access", lambda path, *rest: str(path) != str(folder) and may(path, *rest))
        monkeypatch.setattr("nai_t5_core.prompts.cache.disk.write_whole", _refused)
    found = run("encode", "a cat", *ON_CPU, "--cache-dir", folder, "--json")
    assert found.status == 0 and found.json["loaded"]
    reason = "a file is where it needs a folder" if kind == "a file" else "it belongs to another user"
    assert f"{folder} is not usable: {reason}" in caplog.text and "encoded all the same" in caplog.text


def _refused(*_: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_the_default_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("nai_t5_core.prompts.cache.store.cache_folder", lambda: tmp_path)
    assert run("encode", "a cat", *ON_CPU, "--cache", "--json").json["loaded"]
    assert not run("encode", "a cat", *ON_CPU, "--cache", "--json").json["loaded"]
    status = run("cache", "status", "--json").json
    assert (status["folder"], status["embeddings"]) == (str(tmp_path / "embeddings"), 1)


def test_status_and_clear(run: Run, kept: Path) -> None:  # noqa: F811
    status = run("cache", "status", kept, "--json").json
    assert status["embeddings"] == 2 and status["bytes"] == sum(file.stat().st_size for file in kept.rglob("*.safe*"))
    assert f"{kept}: 2 embeddings, 0.0 MB" in run("cache", "status", kept).stdout
    assert run("cache", "clear", kept, "--json").json == {
        "folder": str(kept),
        "removed": 2,
        "bytes": status["bytes"],
    }
    assert "0 embeddings" in run("cache", "status", kept).stdout and "removed 0" in run("cache", "clear", kept).stdout


def test_verify_finds_and_removes_what_is_damaged(run: Run, kept: Path) -> None:  # noqa: F811
    assert run("cache", "verify", kept).status == 0
    damaged, whole = sorted(kept.rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    found = run("cache", "verify", kept)
    assert found.status == 1 and f"damaged {damaged}: it is damaged" in found.stdout
    assert "2 embeddings, 1 of them damaged" in found.stdout
    removed = run("cache", "verify", kept, "--remove", "--json").json
    assert list(removed["damaged"]) == [str(damaged)] and removed["removed"]
    assert whole.exists() and not damaged.exists()
    assert run("cache", "verify", kept).status == 0


@pytest.mark.parametrize("command", ["status", "clear", "verify"])
def test_what_is_no_folder_is_refused(command: str, run: Run, tmp_path: Path) -> None:  # noqa: F811
    refused = run("cache", command, tmp_path / "nowhere")
    assert refused.status == 2 and "is no folder; give that of a cache" in refused.stderr
