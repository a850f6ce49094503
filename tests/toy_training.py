"""What tests of training share: a folder with data, the config of a small run, and batches as lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoints import spiece_model

from nai_t5_core.training.batches import Batch, Batches
from nai_t5_core.training.config import DataSection, TrainConfig, read_config
from nai_t5_core.training.loop import Run
from nai_t5_core.training.start import first_model

SIZES = {"vocab_size": 4096, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
SIZES |= {"num_decoder_layers": 2, "tie_word_embeddings": True}
CAPTIONS = [f"a {colour} {thing} on a table" for colour in ("red", "blue", "green") for thing in ("cup", "cat", "book")]
PAIRS = [(f"colour of the {colour} cup", colour) for colour in ("red", "blue", "green", "black", "white")]


def write_data(folder: Path) -> Path:
    """Texts, pairs and a tokenizer in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    lines = [json.dumps({"input": question, "target": answer}) for question, answer in PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "spiece.model").write_bytes(spiece_model())
    return folder


def toml(**values: Any) -> str:
    """The text of a small run's config; ``values`` replace or add single ones at the top."""
    top = {"out": "run", "steps": 6, "seed": 3, "device": "cpu", "log_every": 1, "checkpoint_every": 3, **values}
    sizes = "\n".join(f"{name} = {json.dumps(value)}" for name, value in SIZES.items())
    return "\n".join(
        [
            *(f"{name} = {json.dumps(value)}" for name, value in top.items()),
            '[model]\ntokenizer = "spiece.model"',
            f"[model.sizes]\n{sizes}",
            '[optimizer]\nlearning_rate = 0.01\nwarmup = 2\nschedule = "constant"',
            '[[data]]\nobjective = "span-corruption"\nfile = "captions.txt"\nrows = 3',
            '[[data]]\nobjective = "prefix"\nfile = "captions.txt"\nrows = 2',
            '[[data]]\nobjective = "pairs"\nfile = "pairs.jsonl"\nrows = 4',
        ]
    )


def config_in(folder: Path, **values: Any) -> TrainConfig:
    (folder / "train.toml").write_text(toml(**values))
    return read_config(folder / "train.toml")


def run_of(config: TrainConfig) -> Run:
    model, tokenizer = first_model(config)
    return Run(config, model, Batches(config.data, tokenizer, config.seed))


def curve(run: Run, steps: int) -> list[float]:
    return [run.advance().loss for _ in range(steps)]


def sections(folder: Path, **rows: int) -> list[DataSection]:
    files = {"span_corruption": "captions.txt", "prefix": "captions.txt", "pairs": "pairs.jsonl"}
    return [
        DataSection(objective=name.replace("_", "-"), file=folder / files[name], rows=number)
        for name, number in rows.items()
    ]


def rows_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of every row without padding."""
    return [
        (ids[mask.bool()].tolist(), labels[labels != -100].tolist())
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True)
    ]
