"""A disk that fills while something of a caption set is written: one sentence that names the file, and nothing torn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("resource", reason="files have no limit here")

import resource

from toy_captions import captions, made, order, planned, write_captions
from toy_clip import write_clip

from nai_t5_core.datasets import index, plan
from nai_t5_core.datasets.exports import FORMATS, export

TEXTS = captions(60)
FAMILIES = {"pixart": "pixart-sigma", "ltx": "ltx-condition", "sd-scripts-flux": "chroma", "sd-scripts-sd3": "sd3"}


@contextmanager
def little_room(nbytes: int) -> Iterator[None]:
    """No file may become larger, which fails in writing as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("step", "file"), [("write_prompts", "00000.safetensors"), ("write_samples", "samples-00001")])
def test_while_a_plan_is_published(step: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions_file = write_captions(tmp_path / "a.jsonl", TEXTS)
    real = getattr(plan, step)

    def in_little_room(*arguments: Any) -> Any:
        with little_room(500):
            return real(*arguments)

    monkeypatch.setattr(plan, step, in_little_room)
    with pytest.raises(OSError, match=rf"File too large.*; nothing was kept: .*{file}"):
        planned(order(), tmp_path / "set", captions_file)
    left = {path.name for path in (tmp_path / "set").rglob("*")} if (tmp_path / "set").exists() else set()
    assert "plan.json" not in left and not any("part" in name for name in left)
    monkeypatch.undo()
    assert planned(order(), tmp_path / "set", captions_file)[1].samples == len(TEXTS)


def test_while_the_index_is_written(tmp_path: Path) -> None:
    folder = made(order(), tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS))
    before = folder.index.read_bytes()
    with little_room(500), pytest.raises(OSError, match=r"File too large.*; nothing was kept: .*index.parquet"):
        index.write_index(folder)
    assert folder.index.read_bytes() == before


@pytest.mark.parametrize("to", FORMATS)
def test_while_a_trainers_files_are_written(to: str, tmp_path: Path) -> None:
    family = FAMILIES.get(to, "wan")
    clip = write_clip(tmp_path, both=True) if family == "sd3" else None
    folder = made(order(family), tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS)).path
    # CLIP's loading writes a little where pytest keeps what is told.
    room = 100_000 if clip else 500
    with little_room(room), pytest.raises(OSError, match=r"File too large.*; complete files stay: "):
        export(folder, to, tmp_path / "out", clip)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
