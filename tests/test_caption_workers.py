"""What makes the shards of a caption set: processes, machines and Ray's actors, and what becomes of those that fail."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pyarrow")

from toy_captions import captions, digests, made, order, planned, with_a_damaged_row, write_captions

from nai_t5_core.datasets import compute, processes
from nai_t5_core.datasets.compute import Engine, make_shards, to_make
from nai_t5_core.datasets.encoder_choice import EncoderChoice
from nai_t5_core.datasets.on_ray import _Actor
from nai_t5_core.datasets.processes import Job, WorkerDiedError, check_tries, make_in_processes
from nai_t5_core.datasets.worker import Progress, Worker

TEXTS = captions(120)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_captions(tmp_path / "captions.jsonl", TEXTS)


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_make_the_same_shards(tmp_path: Path, file: Path) -> None:
    expected = digests(made(order(), tmp_path / "one", file).path)
    planner, plan = planned(order(), tmp_path / "two", file)
    planner.folder.shards_folder.mkdir()
    job = Job(planner.folder, plan.recipe, order().encoder, 8192, threads=1)
    written: list[int] = []

    def told(progress: Progress) -> None:
        if progress.written is not None:
            written.append(progress.written)
            if len(written) == 1:
                os.kill(next(iter(children_of(os.getpid()))), signal.SIGKILL)

    make_in_processes([job, job], range(len(plan.shards)), told)
    assert digests(tmp_path / "two") == expected


def test_who_cannot_be_told_of_progress_ends_the_run(tmp_path: Path, file: Path) -> None:
    """As where the output is a pipe that nobody reads any more; no process waits for an answer then."""
    planner, plan = planned(order(), tmp_path / "set", file)
    planner.folder.shards_folder.mkdir()
    job = Job(planner.folder, plan.recipe, order().encoder, 8192, threads=1)

    def told(progress: Progress) -> None:
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError, match="nobody reads"):
        make_in_processes([job], range(len(plan.shards)), told)


def children_of(pid: int) -> list[int]:
    """Processes that encode: of those that python starts, the ones with a job."""
    import psutil

    return [child.pid for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())]


def test_a_shard_that_ends_its_worker_each_time_ends_the_run() -> None:
    check_tries(4, 2)
    with pytest.raises(WorkerDiedError, match=r"shard 4 has ended its worker 3 times; .*want of memory"):
        check_tries(4, 3)


@pytest.mark.slow
def test_workers_that_end_while_they_load_end_the_run(tmp_path: Path, file: Path) -> None:
    planner, plan = planned(order(), tmp_path / "set", file)
    job = DiesOnLoading(planner.folder, plan.recipe, order().encoder, 8192)
    with pytest.raises(WorkerDiedError, match="loading the encoder has ended its worker 3 times"):
        make_in_processes([job], range(len(plan.shards)), lambda progress: None)


class DiesOnLoading(Job):
    def worker(self) -> Worker:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class RaisesOnLoading(Job):
    def worker(self) -> Worker:
        raise EOFError("Ran out of input")


def test_what_loading_raises_is_sent_and_not_taken_for_the_end_of_who_asked(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("the process ends without a word"))
    planner, plan = planned(order(), tmp_path / "set", file)
    ours, theirs = Pipe()
    processes._work(theirs, RaisesOnLoading(planner.folder, plan.recipe, order().encoder, 8192))
    assert str(ours.recv()) == "Ran out of input"


def test_a_worker_of_which_nobody_hears_ends(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", end)
    planner, plan = planned(order(), tmp_path / "set", file)
    ours, theirs = Pipe()
    ours.close()
    with pytest.raises(SystemExit):
        processes._work(theirs, Job(planner.folder, plan.recipe, order().encoder, 8192))


def test_what_an_actor_cannot_load_is_told_by_its_first_shard(tmp_path: Path, file: Path) -> None:
    """Ray hides what a constructor raises."""
    planner, plan = planned(order(), tmp_path / "set", file)
    actor = _Actor(Job(planner.folder, plan.recipe, EncoderChoice(source=str(tmp_path / "nothing")), 8192))
    with pytest.raises(ValueError, match="nothing"):
        actor.make(0)


@pytest.mark.slow
def test_what_a_process_raises_is_raised(tmp_path: Path, file: Path) -> None:
    planner, plan = planned(order(), tmp_path / "set", file)
    planner.folder.prompts(1).unlink()
    planner.folder.shards_folder.mkdir()
    job = Job(planner.folder, plan.recipe, order().encoder, 8192, threads=1)
    with pytest.raises(ValueError, match=r"00001.safetensors is damaged or missing"):
        make_in_processes([job, job], range(len(plan.shards)), lambda progress: None)


def test_ranks_share_the_shards(tmp_path: Path, file: Path) -> None:
    expected = digests(made(order(), tmp_path / "one", file).path)
    planner, plan = planned(order(), tmp_path / "two", file)
    parts = [to_make(planner.folder, plan, Engine(rank=rank, world=3)) for rank in range(3)]
    assert sorted(number for part in parts for number in part) == list(range(len(plan.shards)))
    for rank in (2, 0, 1):
        assert not planner.folder.index.exists()
        made(order(), tmp_path / "two", file, engine=Engine(rank=rank, world=3))
    assert planner.folder.index.exists()
    assert digests(tmp_path / "two") == expected


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({"workers": 0}, "workers=0; it must be 1 or more"),
        ({"rank": 2, "world": 2}, "rank 2 of 2; ranks are 0 to 1"),
        ({"ray": "local", "world": 2}, "leave --rank and --world out"),
        ({"token_budget": 0}, "token_budget=0; it must be 1 or more"),
    ],
)
def test_what_makes_shards_is_checked(engine: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Engine(**engine)


def test_each_gpu_has_a_worker(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planner, plan = planned(order(), tmp_path / "set", file)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    job = Job(planner.folder, plan.recipe, EncoderChoice(device="cuda"), 8192)
    assert [each.encoder.device for each in compute._jobs(job, None)] == ["cuda:0", "cuda:1"]
    assert [each.encoder.device for each in compute._jobs(job, 3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [each.encoder.device for each in compute._jobs(job.on("cuda:1"), None)] == ["cuda:1"]


def test_a_worker_whose_encoder_is_not_that_of_the_set_is_refused(tmp_path: Path, file: Path) -> None:
    planner, plan = planned(order(), tmp_path / "set", file)
    encoder, _ = with_a_damaged_row(tmp_path)
    job = Job(planner.folder, plan.recipe, encoder, 8192)
    with pytest.raises(ValueError, match=r"is not that of the set: .*weights is .* there and .* now. Workers need"):
        job.worker()


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_jobs_say_what_auto_stands_for(
    device: str, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with a GPU where the set was planned on one without, auto would be another encoder."""
    sent: list[Job] = []
    monkeypatch.setattr(processes, "resolve_device", lambda name: torch.device("mps"))
    monkeypatch.setattr(compute, "make_in_processes", lambda jobs, numbers, told: sent.extend(jobs))
    planner, plan = planned(order(), tmp_path / "set", file)
    encoder = EncoderChoice(device=device)
    make_shards(planner.folder, plan, encoder, [0], Engine(workers=2), lambda progress: None)
    expected = replace(encoder, dtype=plan.recipe.encoder["dtype"], device="mps" if device == "auto" else "cpu")
    assert [job.encoder for job in sent] == [expected, expected]
    assert expected.dtype in ("float32", "bfloat16")


def test_two_runs_at_once_are_refused(tmp_path: Path, file: Path) -> None:
    def another(progress: Progress) -> None:
        with pytest.raises(ValueError, match="another run is writing in"):
            made(order(), tmp_path / "set", file)

    made(order(), tmp_path / "set", file, told=another)
