"""What the cache takes, measured small: the figures are there and belong together."""

from __future__ import annotations

import pytest
from conftest import TOY_CONFIGS
from test_cli import Run, no_terminal, run  # noqa: F401

from nai_t5_core.bench import cache
from nai_t5_core.bench.cache import CacheTimes, measure_cache

SMALL = TOY_CONFIGS["v1.1"].model_copy(update={"vocab_size": 4096})


@pytest.fixture(scope="module")
def found() -> CacheTimes:
    return measure_cache(SMALL, rounds=3, starts=1)


def test_all_is_measured(found: CacheTimes) -> None:
    assert set(found.cost) == {"memory", "disk"} and set(found.start) == {"a program", "nai-t5 encode"}
    spreads = [
        found.hit_memory,
        found.hit_disk,
        found.miss,
        found.write,
        found.encode,
        *found.cost.values(),
        *found.start.values(),
    ]
    assert all(0 < spread.low <= spread.high for spread in spreads)
    # A copy of 0.6 MB, one with its checksum, and one that is on the disk for certain.
    assert found.hit_memory.median < found.hit_disk.median


def test_nothing_but_rounds_that_count(found: CacheTimes) -> None:
    assert measure_cache(SMALL, rounds=1, starts=0).start == {}
    for rounds, starts in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match="at least 1 round must count"):
            measure_cache(SMALL, rounds, starts)


def test_the_command(run: Run, found: CacheTimes, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    given = []
    monkeypatch.setattr(cache, "measure_cache", lambda *arguments: given.append(arguments[:3]) or found)
    report = run("cache", "bench", "t5-small", "--rounds", "3", "--starts", "1", "--json").json
    assert (report["size"], report["encode"]["median"]) == ("t5-small", found.encode.median)
    shown = run("cache", "bench").stdout
    assert given == [("t5-small", 3, 1), ("t5-v1_1-large", 41, 15)]
    assert "a hit in memory" in shown and "process with a hit (a program)" in shown
    monkeypatch.undo()
    assert "unknown model size 't5-smal'" in run("cache", "bench", "t5-smal").stderr
