"""A caption set on a real local Ray: the same shards, also where a worker or a whole node is killed midway."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ray", reason='no Ray here: pip install ".[ray]"')
pytest.importorskip("pyarrow")

import psutil
import ray
from toy_captions import captions, digests, made, order, planned, write_captions

from nai_t5_core.datasets.compute import Engine
from nai_t5_core.datasets.on_ray import make_on_ray
from nai_t5_core.datasets.processes import Job
from nai_t5_core.datasets.worker import Progress

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TEXTS = captions(400)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_captions(tmp_path / "captions.jsonl", TEXTS)


@pytest.fixture
def expected(tmp_path: Path, file: Path) -> dict[str, str]:
    return digests(made(order(shard_bytes=8_000), tmp_path / "one", file).path)


def actors() -> list[int]:
    """Processes in which an actor encodes, of those that were started by this one."""
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if child.is_running() and "_Actor" in " ".join(_command(child))]


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def test_two_workers(tmp_path: Path, file: Path, expected: dict[str, str]) -> None:
    made(order(shard_bytes=8_000), tmp_path / "two", file, engine=Engine(workers=2, ray="local"))
    assert digests(tmp_path / "two") == expected
    assert not ray.is_initialized()


def test_a_worker_that_is_killed_midway_is_replaced(tmp_path: Path, file: Path, expected: dict[str, str]) -> None:
    killed: list[int] = []

    def told(progress: Progress) -> None:
        if progress.written is not None and not killed:
            killed.append(actors()[0])
            os.kill(killed[0], signal.SIGKILL)

    made(order(shard_bytes=8_000), tmp_path / "two", file, engine=Engine(workers=2, ray="local"), told=told)
    assert killed
    assert digests(tmp_path / "two") == expected


def test_a_node_that_is_lost_midway(tmp_path: Path, file: Path, expected: dict[str, str]) -> None:
    from ray.cluster_utils import Cluster

    planner, plan = planned(order(shard_bytes=8_000), tmp_path / "two", file)
    planner.folder.shards_folder.mkdir()
    job = Job(planner.folder, plan.recipe, order().encoder, 8192)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    lost: list[bool] = []

    def told(progress: Progress) -> None:
        if progress.written is not None and not lost:
            lost.append(True)
            cluster.remove_node(other, allow_graceful=False)

    try:
        make_on_ray(job, range(len(plan.shards)), cluster.address, 2, told)
    finally:
        cluster.shutdown()
    assert lost
    assert digests(tmp_path / "two") == expected


def test_what_a_worker_raises_is_told(tmp_path: Path, file: Path) -> None:
    planner, _ = planned(order(shard_bytes=8_000), tmp_path / "two", file)
    planner.folder.prompts(1).unlink()
    with pytest.raises(ValueError, match=r"shard 1: .*00001.safetensors is damaged or missing"):
        made(order(shard_bytes=8_000), tmp_path / "two", file, engine=Engine(workers=1, ray="local"))
    assert not ray.is_initialized()


def test_what_a_worker_cannot_load_is_told(tmp_path: Path, file: Path) -> None:
    """And not only that it has died."""
    planner, plan = planned(order(shard_bytes=8_000), tmp_path / "two", file)
    planner.folder.shards_folder.mkdir()
    job = Job(planner.folder, plan.recipe, replace(order().encoder, source=str(tmp_path / "nothing")), 8192)
    with pytest.raises(ValueError, match=r"shard [01]: .*nothing does not exist; give a weight file"):
        make_on_ray(job, range(len(plan.shards)), "local", 1, lambda progress: None)


def test_a_cluster_that_is_not_there_is_told(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ValueError, match=r"no Ray [\d.]+ cluster answers at '127.0.0.1:1'"):
        made(order(shard_bytes=8_000), tmp_path / "two", file, engine=Engine(ray="127.0.0.1:1"))
    assert digests(tmp_path / "two") == {}
