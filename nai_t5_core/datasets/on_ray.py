"""Shards handed out to the machines of a Ray cluster.

Ray is told numbers only: its actors load the encoder and write the shards themselves, into a folder that all machines
see. So nothing of a set passes through Ray's object store, and what is complete outlives the cluster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nai_t5_core.datasets.arrow import MissingPackageError
from nai_t5_core.datasets.processes import Job, check_tries
from nai_t5_core.datasets.worker import Progress, Told
from nai_t5_core.model.precision import resolve_device

LOCAL = "local"


def make_on_ray(job: Job, numbers: Sequence[int], address: str, workers: int | None, told: Told) -> None:
    """Makes shards by actors of a Ray cluster; an actor that is lost is replaced, and its shard made again.

    Args:
        address: of the cluster, or ``"local"``: one is started here and ended.
        workers: actors; by default one for each GPU of the cluster, or for each machine where the encoder computes on
            the CPU. Where the cluster has room for fewer, the others wait, which makes a cluster that can grow do so.

    Raises:
        MissingPackageError: Ray is not installed.
        ValueError: there is no cluster at the address, or it has another version; a worker has failed.
    """
    with _cluster(address) as ray:
        _Crew(ray, job, deque(numbers), told, _resources(job), workers or _room(ray, job)).attend()


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError(
            f'--ray needs Ray, which cannot be imported ({error}); pip install "comfy-nai-t5[ray]"'
        ) from error
    try:
        ray.init(
            address=address,
            ignore_reinit_error=False,
            log_to_driver=False,
            logging_level="ERROR",
            **({"include_dashboard": False} if address == LOCAL else {}),
        )
    # Ray has no error of its own for this: it raises ConnectionError, RuntimeError or ValueError by what is wrong.
    except Exception as error:
        raise ValueError(
            f"no Ray cluster of version {ray.__version__} answers at {address!r}: {' '.join(str(error).split())[:300]}. "
            "Start one by ray start --head, give its address, or --ray local"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _resources(job: Job) -> dict[str, float]:
    """What an actor asks for."""
    if resolve_device(job.encoder.device).type == "cuda":
        return {"num_gpus": 1}
    return {"num_cpus": job.threads or 1}


def _room(ray: Any, job: Job) -> int:
    """Actors that the cluster has room for."""
    if "num_gpus" in _resources(job):
        return max(int(ray.cluster_resources().get("GPU", 0)), 1)
    return max(len([node for node in ray.nodes() if node["Alive"]]), 1)


class _Actor:
    """What runs on a machine of the cluster: loads the encoder, and makes one shard for each call."""

    def __init__(self, job: Job) -> None:
        self._worker = job.worker()

    def make(self, number: int) -> list[Progress]:
        told: list[Progress] = []
        self._worker.run([number], told.append)
        return told


@dataclass
class _Crew:
    ray: Any
    job: Job
    waiting: deque[int]
    told: Told
    resources: dict[str, float]
    size: int
    at_work: dict[Any, tuple[Any, int]] = field(default_factory=dict)
    tries: dict[int, int] = field(default_factory=dict)

    def attend(self) -> None:
        for _ in range(min(self.size, len(self.waiting))):
            self._give(self._actor())
        while self.at_work:
            finished, _ = self.ray.wait(list(self.at_work), num_returns=1)
            for call in finished:
                self._answer(call, *self.at_work.pop(call))

    def _actor(self) -> Any:
        return self.ray.remote(**self.resources)(_Actor).remote(self.job)

    def _give(self, actor: Any) -> None:
        if self.waiting:
            number = self.waiting.popleft()
            self.at_work[actor.make.remote(number)] = (actor, number)
        else:
            self.ray.kill(actor)

    def _answer(self, call: Any, actor: Any, number: int) -> None:
        try:
            reports = self.ray.get(call)
        except self.ray.exceptions.RayTaskError as error:
            # What the worker itself has raised.
            raise ValueError(f"shard {number}: {error.cause or error}") from error
        except (self.ray.exceptions.RayActorError, self.ray.exceptions.RaySystemError):
            self.tries[number] = self.tries.get(number, 0) + 1
            check_tries(number, self.tries[number])
            self.waiting.appendleft(number)
            actor = self._actor()
        else:
            for report in reports:
                self.told(report)
        self._give(actor)
