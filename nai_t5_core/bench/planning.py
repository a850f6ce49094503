"""How fast a caption set is planned, and in how much memory.

    python -m nai_t5_core.bench.planning CAPTIONS.txt --tokenizer tokenizer.json --family wan --rows 1000000

The file's captions are repeated with numbers behind them, so that nearly all are unique. Shards have as many rows as
those of 512 MB of a T5-XXL. Memory is that of this process and of those that it starts, where pages that they share are
counted once; it is looked at twice a second (Linux). How long a run that goes on looks for its shards is measured on
files that have everything but rows, which are not read for it.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count, cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Annotated

import torch
import typer

from nai_t5_core.datasets.encoder_choice import EncoderChoice
from nai_t5_core.datasets.folder import SetFolder
from nai_t5_core.datasets.plan import Plan
from nai_t5_core.datasets.prompt_files import read_prompts
from nai_t5_core.datasets.recipe import Feeding, Keeping
from nai_t5_core.datasets.run import Order, missing_shards
from nai_t5_core.datasets.shard_files import Encoded, write_shard

_BETWEEN_LOOKS = 0.5
_PAGES = "Pss:"
# Of the embedded model's 128 numbers a row, as many rows as 512 MB of 4096 numbers.
_SHARD_BYTES = 512_000_000 // 32


class PeakMemory:
    """The largest sum of what this process and its children have in memory, in bytes; 0 where Linux does not tell."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ends = Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        watcher = Thread(target=self._watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._ends.set()
            watcher.join()

    def _watch(self) -> None:
        while not self._ends.wait(_BETWEEN_LOOKS):
            self.bytes = max(self.bytes, sum(map(_memory_of, _family_of(os.getpid()))))


def _family_of(process: int) -> Iterator[int]:
    yield process
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text().split():
                yield from _family_of(int(child))


def _memory_of(process: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith(_PAGES):
                return int(line.split()[1]) * 1024
    return 0


def write_captions(file: Path, lines: list[str], rows: int) -> None:
    numbered = (f"{line}, {number}\n" for number, line in zip(count(), cycle(lines), strict=False))
    with file.open("w", encoding="utf-8") as out:
        out.writelines(islice(numbered, rows))


def write_shards(folder: SetFolder, plan: Plan) -> None:
    """The files of all shards, without rows."""
    folder.shards_folder.mkdir()
    for number in range(len(plan.shards)):
        prompts = read_prompts(folder, number)
        none = torch.empty(0, plan.recipe.d_model)
        encoded = Encoded(none, torch.zeros(len(prompts) + 1, dtype=torch.int64), prompts.tokens, prompts.keys, {})
        write_shard(folder.shard(number), encoded, plan.recipe.keeping)


def measure(
    captions: Path, choice: EncoderChoice, family: str, processes: int | None, folder: Path
) -> dict[str, float]:
    """Planning and planning again: captions a second by the clock and of processor time, and bytes of memory."""
    order, memory = Order(choice, Feeding.choose(family), Keeping(shard_bytes=_SHARD_BYTES)), PeakMemory()
    planner = order.planner(folder, processes)
    began, spent = time.perf_counter(), _processor_seconds()
    with memory.watched():
        plan = planner.plan([captions])
    seconds, spent = time.perf_counter() - began, _processor_seconds() - spent
    again = time.perf_counter()
    order.planner(folder, processes).plan([captions])
    planned_again = time.perf_counter() - again
    write_shards(planner.folder, plan)
    scanned = time.perf_counter()
    missing = missing_shards(planner.folder, plan)
    scanned = time.perf_counter() - scanned
    assert not missing, "shards that were written are there"
    return {
        "captions": plan.samples,
        "unique prompts": plan.prompts,
        "tokens": plan.tokens,
        "captions a second": plan.samples / seconds,
        "captions a second of processor time": plan.samples / spent,
        "bytes of memory": memory.bytes,
        "seconds to plan again": planned_again,
        "shards": len(plan.shards),
        "seconds to see that they are there": scanned,
    }


def _processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main(
    captions: Annotated[Path, typer.Argument(help="Text file, a caption a line.")],
    tokenizer: Annotated[str, typer.Option(help="The tokenizer's file.")],
    family: Annotated[str, typer.Option(help="Diffusion model family.")],
    rows: Annotated[int, typer.Option(help="Captions to plan.")] = 1_000_000,
    processes: Annotated[int | None, typer.Option(help="That tokenize; by default one for each processor.")] = None,
) -> None:
    lines = [line for line in captions.read_text(encoding="utf-8").split("\n") if line]
    with TemporaryDirectory() as folder:
        written = Path(folder) / "captions.txt"
        write_captions(written, lines, rows)
        choice = EncoderChoice(device="cpu", dtype="bfloat16", tokenizer=tokenizer)
        print(json.dumps(measure(written, choice, family, processes, Path(folder) / "set"), indent=1))


if __name__ == "__main__":
    typer.run(main)
