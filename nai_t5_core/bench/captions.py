"""How fast a caption set is made, against what trainers do: transformers at batch 1, padded, or in batches by length.

    python -m nai_t5_core.bench.captions CAPTIONS.txt --tokenizer tokenizer.json --family pixart-sigma

The weights are drawn. All run in this process, in turn, in every round on the next captions of the file; told is the
median of the rounds. ``whole run`` reads a plan and writes shards, ``bare encoder`` computes the same batches only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from nai_t5_core.bench.peers import random_state
from nai_t5_core.datasets.encoder_choice import EncoderChoice
from nai_t5_core.datasets.folder import SetFolder
from nai_t5_core.datasets.plan import Plan
from nai_t5_core.datasets.prompt_files import read_prompts
from nai_t5_core.datasets.recipe import Feeding
from nai_t5_core.datasets.run import Order
from nai_t5_core.datasets.worker import Worker
from nai_t5_core.facts.config import config_to_hf, named_config
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.tokenizer import Tokenizer
from nai_t5_core.weights.formats import write_safetensors

BATCH = 32


class Rivals:
    """The encoders to compare, on one drawn model."""

    def __init__(self, model: Path, tokenizer: str, family: str) -> None:
        from transformers import T5EncoderModel

        self.choice = EncoderChoice(str(model), "bfloat16", "cpu", tokenizer=tokenizer)
        self.feeding = Feeding.choose(family)
        self.tokenizer: Tokenizer = self.choice.find_tokenizer()
        self.stack: T5EncoderStack = self.choice.load().stack
        self.theirs: Any = T5EncoderModel.from_pretrained(model).bfloat16().eval()

    def plan(self, captions: list[str], folder: Path) -> tuple[SetFolder, Plan]:
        folder.mkdir(parents=True)
        (folder / "captions.txt").write_text("\n".join(captions), encoding="utf-8")
        planner = Order(self.choice, self.feeding).planner(folder / "set", processes=1)
        plan = planner.plan([folder / "captions.txt"])
        planner.folder.shards_folder.mkdir()
        return planner.folder, plan

    def worker(self, folder: SetFolder, plan: Plan) -> Worker:
        return Worker(folder, plan.recipe, self.stack)

    @torch.no_grad()
    def padded(self, captions: list[str], batch: int) -> None:
        """As trainers do: to the family's length one by one, or in batches to the longest of each, by length."""
        rows = self.tokenizer(captions, self.feeding.max_length, pad_to=None).input_ids
        rows.sort(key=len)
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            length = self.feeding.max_length if batch == 1 else len(part[-1])
            ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (length - len(row)) for row in part])
            mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in part])
            self.theirs(ids, None if self.feeding.padding == "attend" else mask)


def _bare(worker: Worker, plan: Plan) -> None:
    """The batches of a run, encoded and nothing else."""
    for number in range(len(plan.shards)):
        prompts = read_prompts(worker.folder, number)
        kept = [plan.recipe.feeding.kept_rows(tokens) for tokens in prompts.tokens.tolist()]
        for start, stop in worker.batches(kept):
            worker.embed(prompts, kept, start, stop)


def _seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(
    rivals: Rivals, captions: list[str], at_a_time: int, at_batch_1: int, rounds: int, folder: Path
) -> dict[str, float]:
    """Captions a second of each, by its name."""
    rates: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        start = number * at_a_time
        part = captions[start : start + at_a_time]
        place, plan = rivals.plan(part, folder / str(number))
        worker = rivals.worker(place, plan)
        calls: dict[str, tuple[int, Callable[[], None]]] = {
            "whole run": (plan.prompts, lambda w=worker, p=plan: w.run(range(len(p.shards)))),  # type: ignore[misc]
            "bare encoder": (plan.prompts, lambda w=worker, p=plan: _bare(w, p)),  # type: ignore[misc]
            "transformers, batch 1": (at_batch_1, lambda c=part[:at_batch_1]: rivals.padded(c, 1)),  # type: ignore[misc]
        }
        if rivals.feeding.padding != "attend":
            name = f"transformers, batches of {BATCH} by length"
            calls[name] = (len(part), lambda c=part: rivals.padded(c, BATCH))  # type: ignore[misc]
        for name, (count, call) in calls.items():
            rate = count / _seconds(call)
            # The first round is for caches and prepacking.
            if number:
                rates.setdefault(name, []).append(rate)
    return {name: median(values) for name, values in rates.items()}


def write_model(folder: Path, size: str, layers: int | None = None) -> Path:
    """A drawn model of some size, with all of its layers or the first ones alone."""
    config = named_config(size).encoder_only()
    config = config.model_copy(update={"num_layers": layers or config.num_layers})
    state = random_state(config, dtype=torch.bfloat16)
    folder.mkdir()
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    write_safetensors(folder / "model.safetensors", layout, state.items(), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    return folder


def main(
    captions: Annotated[Path, typer.Argument(help="Text file, a caption a line.")],
    tokenizer: Annotated[str, typer.Option(help="The tokenizer's file.")],
    family: Annotated[str, typer.Option(help="Diffusion model family.")],
    size: Annotated[str, typer.Option(help="A size of T5 such as t5-v1_1-large.")] = "t5-v1_1-large",
    at_a_time: Annotated[int, typer.Option(help="Captions of a round.")] = 64,
    at_batch_1: Annotated[int, typer.Option(help="Of these, how many at batch 1.")] = 3,
    rounds: Annotated[int, typer.Option(help="Rounds that count.")] = 3,
) -> None:
    texts = [line for line in captions.read_text(encoding="utf-8").split("\n") if line]
    with TemporaryDirectory() as folder:
        rivals = Rivals(write_model(Path(folder) / "model", size), tokenizer, family)
        rates = measure(rivals, texts, at_a_time, at_batch_1, rounds, Path(folder) / "sets")
    title = f"{size}, {family}, {torch.get_num_threads()} threads"
    table = Table("", "captions a second", "the whole run is faster by", title=title)
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.2f}", f"{rates['whole run'] / rate:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
