"""Shards handed out to processes of this machine. A process that ends early is replaced, and its shards made again."""

from __future__ import annotations

import os
import platform
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from nai_t5_core.datasets.encoder_choice import EncoderChoice
from nai_t5_core.datasets.folder import SetFolder
from nai_t5_core.datasets.interrupts import deaf_to_interrupts
from nai_t5_core.datasets.recipe import Recipe, common_of_keys, differences
from nai_t5_core.datasets.worker import Progress, Told, Worker
from nai_t5_core.model.precision import resolve_device

# How often a shard may end the process that makes it.
MOST_TRIES = 3


@dataclass(frozen=True)
class Job:
    """What a worker is, whatever runs it: where the set is, how it is computed, and with how much.

    Attributes:
        token_budget: rows that are encoded at a time.
        threads: of torch; None for its own choice.
    """

    folder: SetFolder
    recipe: Recipe
    encoder: EncoderChoice
    token_budget: int
    threads: int | None = None

    def worker(self) -> Worker:
        """Loads the encoder.

        Raises:
            ValueError: it cannot be loaded, or is another than that of the set, such as on a machine that has another
                file under the same name, or that computes otherwise.
        """
        self._refuse_other_encoder()
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        return Worker(self.folder, self.recipe, self.encoder.load().stack, self.token_budget)

    def _refuse_other_encoder(self) -> None:
        found = differences(self.recipe.encoder, common_of_keys(self.encoder.settings().key([0]).text))
        if found:
            raise ValueError(
                f"the encoder that {platform.node()} loads is not that of the set: {'; '.join(found)}. Workers need "
                "the same files and versions, and processors of one kind"
            )

    def pinned(self) -> Job:
        """With the dtype and the device that ``"auto"`` stands for here, wherever it is run."""
        device = resolve_device("auto").type if self.encoder.device == "auto" else self.encoder.device
        return replace(self, encoder=replace(self.encoder, dtype=self.recipe.encoder["dtype"], device=device))

    def on(self, device: str) -> Job:
        return replace(self, encoder=self.encoder.on(device))

    def with_threads(self, threads: int | None) -> Job:
        return replace(self, threads=threads)


class WorkerDiedError(ValueError):
    """Processes that make a shard end without a word, again and again."""


def check_tries(number: int | None, tries: int) -> None:
    """Raises a WorkerDiedError where a shard has ended enough workers, or loading the encoder (None) has."""
    if tries >= MOST_TRIES:
        what = "loading the encoder" if number is None else f"shard {number}"
        raise WorkerDiedError(
            f"{what} has ended its worker {tries} times; the system may have killed it for want of memory: try "
            "fewer workers or a smaller token budget. Shards that are complete stay"
        )


def make_in_processes(jobs: Sequence[Job], numbers: Sequence[int], told: Told) -> None:
    """Makes shards in a process for each job.

    Raises:
        WorkerDiedError: a shard's processes end again and again.
        Exception: what a worker has raised, such as of a full disk.
    """
    crew = _Crew(deque(numbers), told)
    try:
        for job in jobs[: max(len(numbers), 1)]:
            crew.start(job)
        crew.attend()
    finally:
        crew.dismiss()


@dataclass
class _Member:
    job: Job
    process: BaseProcess
    pipe: Connection
    given: list[int] = field(default_factory=list)


@dataclass
class _Crew:
    waiting: deque[int]
    told: Told
    members: list[_Member] = field(default_factory=list)
    tries: dict[int | None, int] = field(default_factory=dict)

    def start(self, job: Job) -> None:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, job), daemon=True)
        with deaf_to_interrupts():
            process.start()
        theirs.close()
        self.members.append(_Member(job, process, ours))

    def attend(self) -> None:
        """Answers the members until none is left."""
        while self.members:
            for pipe in wait([member.pipe for member in self.members]):
                member = next(member for member in self.members if member.pipe is pipe)
                try:
                    message = member.pipe.recv()
                except (EOFError, ConnectionError):
                    self._replace(member)
                else:
                    self._answer(member, message)

    def _answer(self, member: _Member, message: object) -> None:
        if isinstance(message, Exception):
            raise message
        if isinstance(message, Progress):
            if message.written is not None:
                member.given.remove(message.written)
            self.told(message)
        else:
            number = self.waiting.popleft() if self.waiting else None
            if number is not None:
                member.given.append(number)
            # Where it is gone, there is nothing more to receive of it either.
            with suppress(ConnectionError):
                member.pipe.send(number)

    def _replace(self, member: _Member) -> None:
        """A member that is gone: as it was told to, or else its shards wait again and another takes its place."""
        member.process.join()
        self.members.remove(member)
        if member.process.exitcode != 0:
            # One that has no shard yet has ended while it loaded the encoder.
            tried: list[int | None] = [*member.given] or [None]
            for number in tried:
                self.tries[number] = self.tries.get(number, 0) + 1
                check_tries(number, self.tries[number])
        self.waiting.extendleft(reversed(member.given))
        if self.waiting:
            self.start(member.job)

    def dismiss(self) -> None:
        for member in self.members:
            member.process.terminate()
            member.process.join()


def _work(pipe: Connection, job: Job) -> None:
    """What a process does: asks for numbers and tells of its progress, until it is told None or nobody answers."""
    line = _Line(pipe)
    try:
        job.worker().run(line.numbers(), line.tell)
    except _NobodyAnswersError:
        os._exit(1)
    except Exception as error:
        with suppress(ConnectionError):
            pipe.send(_as_sent(error))


class _NobodyAnswersError(Exception):
    """The process that has started this one is gone. Loading an encoder may raise what a broken pipe does."""


@dataclass(frozen=True)
class _Line:
    pipe: Connection

    def numbers(self) -> Iterator[int]:
        while (number := self._asked()) is not None:
            yield number

    def tell(self, message: object) -> None:
        with _answered():
            self.pipe.send(message)

    def _asked(self) -> int | None:
        with _answered():
            self.pipe.send("next")
            number: int | None = self.pipe.recv()
            return number


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise _NobodyAnswersError from error


def _as_sent(error: Exception) -> Exception:
    """An error that can be sent to another process and is of a kind that commands tell in a line, where it was one."""
    kind = OSError if isinstance(error, OSError) else ValueError if isinstance(error, ValueError) else RuntimeError
    return kind(str(error) or type(error).__name__)
