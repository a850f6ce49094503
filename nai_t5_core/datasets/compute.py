"""The shards of a plan, made by one of three engines: this process, several of this machine, or Ray."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from nai_t5_core.datasets.encoder_choice import EncoderChoice
from nai_t5_core.datasets.folder import SetFolder
from nai_t5_core.datasets.index import write_index
from nai_t5_core.datasets.plan import Plan
from nai_t5_core.datasets.processes import Job, make_in_processes
from nai_t5_core.datasets.run import missing_shards, of_rank
from nai_t5_core.datasets.worker import Told
from nai_t5_core.facts.given_numbers import whole_number
from nai_t5_core.prompts.text_encoder import DEFAULT_TOKEN_BUDGET
from nai_t5_core.weights.whole_files import alone_in


@dataclass(frozen=True)
class Engine:
    """What makes the shards.

    Attributes:
        workers: processes, or Ray's actors; by default one for each GPU, or one.
        rank, world: which machine of how many this is, where a scheduler of a cluster starts this program on each.
        ray: the address of a Ray cluster, ``"local"`` for one that is started here, or None.
        token_budget: rows that are encoded at a time.
    """

    workers: int | None = None
    rank: int = 0
    world: int = 1
    ray: str | None = None
    token_budget: int = DEFAULT_TOKEN_BUDGET

    def __post_init__(self) -> None:
        if self.workers is not None:
            whole_number("workers", self.workers, 1)
        whole_number("token_budget", self.token_budget, 1)
        of_rank([], self.rank, self.world)
        if self.ray is not None and self.world > 1:
            raise ValueError("Ray hands out the shards of all machines; leave --rank and --world out")


def to_make(folder: SetFolder, plan: Plan, engine: Engine) -> list[int]:
    """The shards that this machine has to make."""
    return of_rank(missing_shards(folder, plan), engine.rank, engine.world)


def make_shards(
    folder: SetFolder, plan: Plan, encoder: EncoderChoice, numbers: list[int], engine: Engine, told: Told
) -> None:
    """Makes shards, and the index when all of the plan are there. What is complete stays, whatever happens.

    Raises:
        ValueError: another run is making shards here; a worker has failed; Ray is not there.
        OSError: a file cannot be written, or the disk is full.
    """
    folder.shards_folder.mkdir(parents=True, exist_ok=True)
    # Several machines share a folder on purpose.
    with alone_in(folder.shards_folder) if engine.world == 1 else nullcontext():
        if numbers:
            _make(folder, plan, encoder, numbers, engine, told)
        if not missing_shards(folder, plan):
            write_index(folder)


def _make(
    folder: SetFolder, plan: Plan, encoder: EncoderChoice, numbers: list[int], engine: Engine, told: Told
) -> None:
    job = Job(folder, plan.recipe, encoder, engine.token_budget).pinned()
    if engine.ray is not None:
        from nai_t5_core.datasets.on_ray import make_on_ray

        make_on_ray(job, numbers, engine.ray, engine.workers, told)
        return
    jobs = _jobs(job, engine.workers)
    if len(jobs) == 1:
        jobs[0].worker().run(numbers, told)
    else:
        make_in_processes(jobs, numbers, told)


def _jobs(job: Job, workers: int | None) -> list[Job]:
    """A job for each worker: GPUs in turn, or processors in equal parts."""
    device = torch.device(job.encoder.device)
    if device.type == "cuda" and device.index is None:
        gpus = torch.cuda.device_count()
        return [job.on(f"cuda:{number % gpus}") for number in range(workers or gpus)]
    if workers is None or workers == 1:
        return [job]
    return [job.with_threads(max((os.cpu_count() or 1) // workers, 1)) for _ in range(workers)]
