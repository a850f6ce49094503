"""``examples/pretrain_captions.py``, from captions to a step of training."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

from examples.pretrain_captions import batches, captions, main, precompute


def test_from_captions_to_a_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "captions-wan"
    main(out)
    told = capsys.readouterr().out
    assert "120 captions, 1678 tokens" in told and "loss after an epoch" in told
    read = list(batches(out, workers=0))
    assert sum(len(states) for states, _ in read) == len(list(captions())) == 120
    assert all(states.shape[:2] == mask.shape and states.shape[2] == 128 for states, mask in read)
    before = sorted((out / "shards").iterdir())
    precompute(out.with_suffix(".jsonl"), out)
    assert sorted((out / "shards").iterdir()) == before
