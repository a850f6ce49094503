"""Shards handed out to the machines of a Ray cluster.

Ray is told numbers only: its actors load the encoder and write the shards themselves, into a folder that all machines
see. So nothing of a set passes through Ray's object store, and what is complete outlives the cluster.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch

from nai_t5_core.datasets.arrow import MissingPackageError
from nai_t5_core.datasets.processes import Job, check_tries
from nai_t5_core.datasets.worker import Progress, Told, Worker

LOCAL = "local"
# Seconds.
_ANSWERS_WITHIN = 10.0


def make_on_ray(job: Job, numbers: Sequence[int], address: str, workers: int | None, told: Told) -> None:
    """Makes shards by actors of a Ray cluster; an actor that is lost is replaced, and its shard made again.

    Args:
        address: of the cluster, or ``"local"``: one is started here and ended.
        workers: actors; by default one for each GPU of the cluster, or for each machine where the encoder computes on
            processors. Where the cluster has room for fewer, the others wait, which makes a cluster grow that can.

    Raises:
        MissingPackageError: Ray is not installed.
        ValueError: there is no cluster at the address, or it has another version; a worker has failed.
    """
    if torch.device(job.encoder.device).type == "cuda":
        # An actor sees one GPU, whatever its number is on the machine.
        job = job.on("cuda")
    with _cluster(address) as ray:
        size, resources = _share(ray, job, workers)
        _Crew(ray, job.with_threads(resources.get("num_cpus")), deque(numbers), told, resources, size).attend()


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError(
            f'--ray needs Ray, which cannot be imported ({error}); pip install "comfy-nai-t5[ray]"'
        ) from error
    try:
        _refuse_silence(address)
        ray.init(
            address=address,
            ignore_reinit_error=False,
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False if address == LOCAL else None,
        )
    # Ray has no error of its own for this: it raises ConnectionError, RuntimeError or ValueError by what is wrong.
    except Exception as error:
        raise ValueError(
            f"no Ray {ray.__version__} cluster answers at {address!r}: {' '.join(str(error).split())[:300]}. "
            "Start one by ray start --head, give its address, or --ray local"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _refuse_silence(address: str) -> None:
    """Raises an OSError where nobody listens: Ray itself would wait for many minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_ANSWERS_WITHIN).close()


def _share(ray: Any, job: Job, workers: int | None) -> tuple[int, dict[str, int]]:
    """How many actors there shall be, and what each asks for: a GPU, or its part of the processors."""
    there = ray.cluster_resources()
    if torch.device(job.encoder.device).type == "cuda":
        return workers or max(int(there.get("GPU", 0)), 1), {"num_gpus": 1}
    machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    size = workers or max(len(machines), 1)
    part = int(min(there.get("CPU", 1) // size, max(machines, default=1)))
    return size, {"num_cpus": max(part, 1)}


class _Actor:
    """What runs on a machine of the cluster: loads the encoder, and makes a shard for each call.

    Of two calls at once, one encodes while the other writes. The first call loads: of what a constructor raises, Ray
    tells no more than that the actor has died.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._worker: Worker | None = None
        self._loading = Lock()

    def make(self, number: int) -> list[Progress]:
        with self._loading:
            self._worker = self._worker or self._job.worker()
        told: list[Progress] = []
        self._worker.run([number], told.append)
        return told


# Calls that an actor has at a time.
_CALLS = 2


@dataclass
class _Crew:
    ray: Any
    job: Job
    waiting: deque[int]
    told: Told
    resources: dict[str, int]
    size: int
    at_work: dict[Any, tuple[Any, int]] = field(default_factory=dict)
    tries: dict[int, int] = field(default_factory=dict)

    def attend(self) -> None:
        for _ in range(min(self.size, len(self.waiting))):
            self._start()
        while self.at_work:
            finished, _ = self.ray.wait(list(self.at_work), num_returns=1)
            for call in finished:
                if call in self.at_work:
                    self._answer(call)

    def _start(self) -> None:
        actor = self.ray.remote(**self.resources, max_concurrency=_CALLS)(_Actor).remote(self.job)
        for _ in range(_CALLS):
            self._give(actor)

    def _give(self, actor: Any) -> None:
        if self.waiting:
            number = self.waiting.popleft()
            self.at_work[actor.make.remote(number)] = (actor, number)
        elif all(other is not actor for other, _ in self.at_work.values()):
            self.ray.kill(actor)

    def _answer(self, call: Any) -> None:
        actor, number = self.at_work.pop(call)
        try:
            reports = self.ray.get(call)
        except self.ray.exceptions.RayTaskError as error:
            # What the worker itself has raised.
            raise ValueError(f"shard {number}: {error.cause or error}") from error
        except self.ray.exceptions.RayError:
            self._replace(actor, number)
            return
        for report in reports:
            self.told(report)
        self._give(actor)

    def _replace(self, actor: Any, number: int) -> None:
        """An actor is lost, with its machine perhaps: its shards wait again, and another takes its place."""
        lost = [call for call, (other, _) in self.at_work.items() if other is actor]
        numbers = sorted([number, *(self.at_work.pop(call)[1] for call in lost)])
        for one in numbers:
            self.tries[one] = self.tries.get(one, 0) + 1
            check_tries(one, self.tries[one])
        self.waiting.extendleft(reversed(numbers))
        self._start()
