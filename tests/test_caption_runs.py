"""Runs of ``nai-t5 precompute``: resumed after kills, and their folders looked after."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("pyarrow")

from toy_captions import captions, digests, made, order, planned, with_a_damaged_row, write_captions

from nai_t5_core.cli import app
from nai_t5_core.datasets import check
from nai_t5_core.datasets.check import collect_garbage, status_of, verify
from nai_t5_core.datasets.folder import SetFolder
from nai_t5_core.datasets.index import read_index
from nai_t5_core.datasets.plan import existing_plan
from nai_t5_core.datasets.worker import Progress
from nai_t5_core.weights.whole_files import alone_in

TEXTS = captions(120)


def arguments(file: Path, out: Path, *more: str) -> list[str]:
    # Shards are counted in megabytes there; the tests of small ones make theirs by the library.
    given = ["precompute", str(file), "--id", "id", "--family", "wan", "--device", "cpu", "--out", str(out)]
    return [*given, *more]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_captions(tmp_path / "captions.jsonl", TEXTS)


# A run of small shards, in a process that can be killed.
RUN = """
import sys
from pathlib import Path
from toy_captions import made, order
from nai_t5_core.datasets.compute import Engine

def told(progress):
    if progress.written is not None:
        print(progress.written, flush=True)

if __name__ == "__main__":
    made(order(shard_bytes=int(sys.argv[4])), Path(sys.argv[1]), Path(sys.argv[2]), told=told,
         engine=Engine(workers=int(sys.argv[3])))
"""


def start(out: Path, file: Path, workers: int, shard_bytes: int) -> subprocess.Popen[str]:
    script = out.parent / "run.py"
    script.write_text(RUN)
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    given = [sys.executable, str(script), str(out), str(file), str(workers), str(shard_bytes)]
    return subprocess.Popen(
        given, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def kill_at_random(out: Path, file: Path, workers: int, kills: int, shard_bytes: int, longest: float) -> int:
    """Kills runs until one has ended by itself; gives how often a run was killed at work.

    A kill comes at a random moment, while the program starts perhaps, but soon after some shards at the latest.
    """
    done, chance = 0, random.Random(0)
    while True:
        run = start(out, file, workers, shard_bytes)
        if done < kills:
            assert run.stdout is not None
            moment = threading.Timer(chance.random() * longest, end, [run])
            moment.start()
            for _ in range(chance.randint(1, 10)):
                run.stdout.readline()
            time.sleep(chance.random() * 0.02)
            moment.cancel()
            end(run)
        status = run.wait()
        for path in (out / "shards").glob("*.safetensors"):
            assert path.stat().st_size > 0
        if status != -signal.SIGKILL:
            assert status == 0
            return done
        done += 1


def end(run: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)


def check_killed(tmp_path: Path, count: int, workers: int, kills: int, shard_bytes: int, longest: float) -> int:
    texts = {name: f"{text} {name}" for name, text in captions(count).items()}
    file = write_captions(tmp_path / "captions.jsonl", texts)
    whole = made(order(shard_bytes=shard_bytes), tmp_path / "whole", file)
    killed = kill_at_random(tmp_path / "killed", file, workers, kills, shard_bytes, longest)
    folder = SetFolder(tmp_path / "killed")
    collect_garbage(folder)
    assert digests(folder.path) == digests(whole.path)
    assert read_index(folder).equals(read_index(whole))
    samples = folder.samples(existing_plan(folder).edition)
    assert samples.read_bytes() == whole.samples(existing_plan(whole).edition).read_bytes()
    assert verify(folder) == {}
    left = {path.name for path in folder.path.iterdir()}
    assert left == {"plan.json", samples.name, "index.parquet", "plan", "shards"}
    return killed


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    assert check_killed(tmp_path, 200, workers=1, kills=1, shard_bytes=20_000, longest=3.0) == 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_twenty_kills(workers: int, tmp_path: Path, record_property: Any) -> None:
    """In several sets, where a run ends before its time."""
    killed = sets = 0
    while killed < 20:
        place = tmp_path / str(sets)
        killed += check_killed(place, 3000, workers, 20 - killed, shard_bytes=20_000, longest=4.0 * workers)
        sets += 1
        assert sets < 10
    record_property("runs killed", f"{killed}, of {sets} sets")


def test_at_most_one_shard_is_computed_again(tmp_path: Path, file: Path) -> None:
    """Counted by the tokens that were encoded before and after a fault in the writing of the third shard."""
    planner, plan = planned(order(), tmp_path / "set", file)
    planner.folder.shards_folder.mkdir()
    planner.folder.shard(2).mkdir()
    told: list[Progress] = []
    with pytest.raises(ValueError, match="is a folder"):
        made(order(), tmp_path / "set", file, told=told.append)
    planner.folder.shard(2).rmdir()
    made(order(), tmp_path / "set", file, told=told.append)
    again = sum(progress.tokens for progress in told) - plan.tokens
    assert 0 < again <= sum(shard.tokens for shard in plan.shards[2:4])


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_says_what_there_is_to_do_and_what_was_done(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    app(arguments(file, out, "--plan-only"), standalone_mode=False)
    told = capsys.readouterr().err
    unique = len(set(TEXTS.values()))
    assert (out / "plan.json").is_file()
    assert f"120 samples, {unique} unique prompts;" in told and "1 shard, to be made: 1" in told
    assert not (out / "shards").exists()
    app(arguments(file, out), standalone_mode=False)
    captured = capsys.readouterr()
    assert captured.out.startswith("made 1 shard,") and "1 of 1 shard" in captured.err
    app(["precompute", "status", str(out), "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["prompts"], found["missing"], found["failures"]) == (120, unique, [], {})
    app(["precompute", "verify", str(out)], standalone_mode=False)
    assert "all shards that are there are whole" in capsys.readouterr().out


def test_a_disk_that_will_fill_is_told_beforehand(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1_000))
    app(arguments(file, tmp_path / "set", "--plan-only"), standalone_mode=False)
    told = capsys.readouterr().err
    assert re.search(r"warning: shards of \d\.\d MB are to be made, and the disk has 0\.0 MB free", told)


def test_a_run_with_nothing_to_make_says_so(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        capsys.readouterr()
        app(arguments(file, tmp_path / "set"), standalone_mode=False)
    captured = capsys.readouterr()
    assert "1 shard, to be made: 0" in captured.err and captured.out == ""


def test_another_rank_waits_for_the_plan(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    late = threading.Timer(0.5, lambda: planned(order(shard_bytes=512_000_000), out, file))
    late.start()
    app(arguments(file, out, "--rank", "1", "--world", "2", "--json"), standalone_mode=False)
    late.join()
    captured = capsys.readouterr()
    assert json.loads(captured.out)["made"] == 0
    assert f"waiting until rank 0 has planned these files in {out / 'plan.json'}" in captured.err


def test_another_rank_does_not_wait_for_ever(tmp_path: Path, file: Path) -> None:
    given = arguments(file, tmp_path / "set", "--rank", "1", "--world", "2", "--plan-wait", "0")
    with pytest.raises(ValueError, match=r"rank 0 has not planned .*plan.json within 0 minutes: see what"):
        app(given, standalone_mode=False)


def test_plan_only_says_that_it_plans(capsys: pytest.CaptureFixture[str]) -> None:
    app(["precompute", "run", "--help"], standalone_mode=False)
    assert "Plan, say what there is to do, and encode nothing" in re.sub(r"[│\s]+", " ", capsys.readouterr().out)


def test_a_prompt_that_fails_is_told_and_the_status_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder, word = with_a_damaged_row(tmp_path)
    file = write_captions(tmp_path / "a.jsonl", {"good": "two dogs", "bad": f"{word} sleep"})
    out = tmp_path / "set"
    given = arguments(file, out, "--model", str(encoder.source), "--tokenizer", str(encoder.tokenizer))
    assert app(given, standalone_mode=False) == 1
    assert "1 prompt failed and has no embedding" in capsys.readouterr().err
    app(["precompute", "status", str(out)], standalone_mode=False)
    assert "shared.weight holds values that are not finite" in capsys.readouterr().err
    app(["precompute", "gc", str(out), "--failed"], standalone_mode=False)
    assert status_of(SetFolder(out)).missing == [0]


def test_verify_names_a_changed_byte_and_the_next_run_mends_it(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(order(), tmp_path / "set", file)
    before = digests(folder.path)
    content = bytearray(folder.shard(2).read_bytes())
    content[-5] ^= 1
    folder.shard(2).write_bytes(content)
    assert app(["precompute", "verify", str(folder.path)], standalone_mode=False) == 1
    assert "00002.safetensors is damaged: its bytes are not those" in capsys.readouterr().err
    assert status_of(folder).missing == [2]
    made(order(), tmp_path / "set", file)
    assert [path.name for path in collect_garbage(folder)] == ["00002.safetensors.damaged"]
    assert digests(folder.path) == before


@pytest.mark.parametrize("look", [collect_garbage, verify])
def test_what_another_run_has_made_before_a_folder_is_had_alone_belongs_to_it(
    look: Callable[[SetFolder], Any], tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(order(), tmp_path / "set", file)
    more = write_captions(tmp_path / "more.jsonl", captions(120, first=500))

    @contextmanager
    def late(path: Path) -> Iterator[None]:
        if path == folder.path or look is verify:
            made(order(), folder.path, file, more)
            damaged = len(existing_plan(folder).shards) - 1
            folder.shard(damaged).write_bytes(b"x") if look is verify else None
        with alone_in(path):
            yield

    monkeypatch.setattr(check, "alone_in", late)
    found = look(folder)
    if look is collect_garbage:
        assert found == [folder.samples(1)]
    else:
        assert list(found) == [len(existing_plan(folder).shards) - 1]


def test_garbage_is_what_no_plan_has(tmp_path: Path, file: Path) -> None:
    folder = made(order(), tmp_path / "set", file)
    before = digests(folder.path)
    strange = folder.shards_folder / "00999.safetensors"
    strange.write_bytes(b"x")
    folder.ledger.write_bytes(b"x")
    unfinished = folder.shards_folder / "00001.safetensors.0123abcd.nai-t5.part"
    unfinished.write_bytes(b"x")
    assert set(collect_garbage(folder)) == {strange, folder.ledger}
    assert not unfinished.exists()
    assert digests(folder.path) == before
