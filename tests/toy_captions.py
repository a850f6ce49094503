"""Small caption sets of the embedded model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from conftest import TOY_CONFIGS, random_state, write_hf_folder
from torch import Tensor

from nai_t5_core.datasets.captions import Columns
from nai_t5_core.datasets.compute import Engine, make_shards, to_make
from nai_t5_core.datasets.encoder_choice import EncoderChoice
from nai_t5_core.datasets.folder import SetFolder
from nai_t5_core.datasets.plan import Plan, Planner
from nai_t5_core.datasets.recipe import Feeding, Keeping
from nai_t5_core.datasets.run import Order
from nai_t5_core.datasets.worker import Progress
from nai_t5_core.facts.config import T5Config
from nai_t5_core.weights.examine import find_tokenizer_for

ENCODER = EncoderChoice(device="cpu")
WORDS = [
    "a",
    "red",
    "fox",
    "runs",
    "over",
    "the",
    "green",
    "hill",
    "while",
    "two",
    "old",
    "dogs",
    "sleep",
    "in",
    "warm",
    "snow",
    "under",
    "tall",
    "trees",
]


def captions(count: int, first: int = 0) -> dict[str, str]:
    """Captions of several lengths by id, some of them the same."""
    texts = {}
    for number in range(first, first + count):
        length = 1 + number % 7 * 2
        start = number // 10 % len(WORDS)
        texts[f"clip/{number:04d}"] = " ".join((WORDS[start:] + WORDS)[:length])
    return texts


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_captions(file: Path, texts: Mapping[str, str]) -> Path:
    return write_rows(file, [{"id": name, "caption": text} for name, text in texts.items()])


def order(
    family: str | None = "wan", encoder: EncoderChoice = ENCODER, id_column: str | None = "id", **keeping: Any
) -> Order:
    feeding = Feeding.choose(family) if family else Feeding.choose(max_length=64)
    return Order(encoder, feeding, Keeping(**{"shard_bytes": 20_000, **keeping}), Columns("caption", id_column))


def planned(chosen: Order, folder: Path, *files: Path) -> tuple[Planner, Plan]:
    planner = chosen.planner(folder, processes=1)
    return planner, planner.plan(list(files))


def made(
    chosen: Order,
    folder: Path,
    *files: Path,
    engine: Engine | None = None,
    told: Callable[[Progress], None] = lambda progress: None,
) -> SetFolder:
    """A set that is planned and encoded."""
    planner, plan = planned(chosen, folder, *files)
    engine = engine or Engine()
    numbers = to_make(planner.folder, plan, engine)
    make_shards(planner.folder, plan, chosen.encoder, numbers, engine, told)
    return planner.folder


def digests(folder: Path) -> dict[str, str]:
    """The hash of every shard's file."""
    files = sorted((folder / "shards").iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def with_a_damaged_row(folder: Path) -> tuple[EncoderChoice, str]:
    """An encoder that has no finite embedding for one word, and that word."""
    tokenizer = find_tokenizer_for(None)
    config = TOY_CONFIGS["v1.1"].model_copy(update={"vocab_size": tokenizer.vocab_size})
    state = random_state(config)
    state["shared.weight"][tokenizer.encode("fox")[0]] = float("nan")
    return _drawn(folder, config, state), "fox"


def with_a_vocabulary(folder: Path, size: int) -> EncoderChoice:
    """An encoder that has so many rows of embeddings, and perhaps fewer than its tokenizer has tokens."""
    config = TOY_CONFIGS["v1.1"].model_copy(update={"vocab_size": size})
    return _drawn(folder, config, random_state(config))


def _drawn(folder: Path, config: T5Config, state: dict[str, Tensor]) -> EncoderChoice:
    kind, content = find_tokenizer_for(None).serialized()
    model = write_hf_folder(folder / "model", config, state)
    (folder / kind).write_bytes(content)
    return EncoderChoice(str(model), "float32", "cpu", tokenizer=str(folder / kind))
