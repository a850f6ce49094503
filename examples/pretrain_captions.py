"""A caption set from text to a training batch, with the tiny embedded model: no download, a few seconds.

python examples/pretrain_captions.py

The captions below are this project's own. With a diffusion model's T5, the command does the same:

    nai-t5 precompute captions.jsonl --id id --family wan --model umt5-xxl.safetensors --out captions-wan
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import typer
from torch import Tensor
from torch.utils.data import DataLoader

from nai_t5_core import EmbeddingDataset
from nai_t5_core.datasets.captions import Columns
from nai_t5_core.datasets.compute import Engine, make_shards, to_make
from nai_t5_core.datasets.encoder_choice import EncoderChoice
from nai_t5_core.datasets.reading import collate
from nai_t5_core.datasets.recipe import Feeding, Keeping
from nai_t5_core.datasets.run import Order
from nai_t5_core.datasets.sampler import LengthSampler

SUBJECTS = ("a red fox", "an old fisherman", "two children", "a paper boat", "a black cat", "the last tram")
PLACES = ("in the snow", "under a stone bridge", "on a roof at dawn", "between tall birches", "beside a lighthouse")
DETAILS = ("", "seen from above", "in soft grey light", "with a lantern, while rain begins to fall on the quiet street")


def captions() -> Iterator[dict[str, str]]:
    texts = (f"{subject} {place} {detail}".strip() for subject in SUBJECTS for place in PLACES for detail in DETAILS)
    for number, text in enumerate(texts):
        yield {"id": f"clip-{number:03d}", "caption": text}


def precompute(file: Path, out: Path, family: str = "wan") -> None:
    """Encodes the captions of a file into a folder; run again, it goes on where it ended."""
    encoder = EncoderChoice()
    order = Order(encoder, Feeding.choose(family), Keeping(shard_bytes=100_000), Columns("caption", "id"))
    planner = order.planner(out)
    plan = planner.plan([file])
    print(f"{plan.samples} captions, {plan.tokens} tokens, {len(plan.shards)} shards")
    engine = Engine()
    make_shards(planner.folder, plan, encoder, to_make(planner.folder, plan, engine), engine, lambda progress: None)


def batches(folder: Path, batch_size: int = 16, workers: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
    """States [batch, length, d_model] and masks [batch, length] of an epoch."""
    dataset = EmbeddingDataset(folder)
    sampler = LengthSampler(dataset, batch_size)
    yield from DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers)


def train(folder: Path) -> float:
    """The loss of a linear layer after an epoch, in the place of a diffusion model."""
    torch.manual_seed(0)
    model, loss = torch.nn.Linear(128, 128), torch.zeros(())
    optimizer = torch.optim.AdamW(model.parameters())
    for states, mask in batches(folder):
        loss = (model(states.float()) - states.float())[mask].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main(out: Path = Path("captions-wan")) -> None:
    file = out.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in captions()))
    precompute(file, out)
    states, mask = next(batches(out))
    print(f"a batch: states {list(states.shape)} {states.dtype}, mask {list(mask.shape)}, {int(mask.sum())} tokens")
    print(f"loss after an epoch: {train(out):.3f}")


if __name__ == "__main__":
    typer.run(main)
