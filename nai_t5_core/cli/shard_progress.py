"""Bars of a caption set's run: captions that are planned, and tokens that are encoded, with rate and remaining time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from nai_t5_core.cli.terminal import counted, err, say

if TYPE_CHECKING:
    from nai_t5_core.datasets.plan import Plan
    from nai_t5_core.datasets.worker import Progress as Told

_RATE = TextColumn("{task.fields[rate]}", markup=False)


@contextmanager
def planning_bar() -> Iterator[Callable[[int], None]]:
    """Gives the function to call with the rows that were planned."""
    columns = (TextColumn("planning {task.completed:,.0f} captions", markup=False), _RATE)
    began = time.monotonic()
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=None, rate="")

        def advance(rows: int) -> None:
            bar.advance(task, rows)
            rate = bar.tasks[0].completed / max(time.monotonic() - began, 1e-9)
            bar.update(task, rate=f"{rate:,.0f} a second")

        yield advance


@dataclass
class ShardsTold:
    """What is told of a run; on a terminal by a bar, else by a line for each shard that is complete."""

    bar: Progress
    task: TaskID
    total_tokens: int
    total_shards: int
    began: float = field(default_factory=time.monotonic)
    tokens: int = 0
    shards: int = 0
    failures: int = 0

    def __call__(self, progress: Told) -> None:
        self.tokens += progress.tokens
        self.failures += progress.failures
        rate = self.tokens / max(time.monotonic() - self.began, 1e-9)
        self.bar.update(self.task, completed=self.tokens, rate=f"{rate:,.0f} tokens a second")
        if progress.written is not None:
            self.shards += 1
            if self.bar.disable:
                left = max(self.total_tokens - self.tokens, 0) / max(rate, 1e-9)
                shards = f"{self.shards:,} of {counted(self.total_shards, 'shard')}"
                say(f"{shards}, {rate:,.0f} tokens a second, {_time(left)} left", err)


@contextmanager
def shards_bar(plan: Plan, numbers: list[int]) -> Iterator[ShardsTold]:
    """Gives what is to be called with the progress of workers."""
    total = sum(plan.shards[number].tokens for number in numbers)
    columns = (TextColumn("encoding", markup=False), BarColumn(), MofNCompleteColumn(), _RATE, TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        yield ShardsTold(bar, bar.add_task("", total=total, rate=""), total, len(numbers))


def _time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
