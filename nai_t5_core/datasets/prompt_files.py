"""``plan/NNNNN.safetensors``: the prompts of a shard, as ids. A worker needs nothing else of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from nai_t5_core.datasets.folder import SetFolder, lasting
from nai_t5_core.datasets.recipe import Recipe
from nai_t5_core.datasets.tokens import Prompt


@dataclass(frozen=True)
class Shard:
    """What a plan says of a shard: its prompts, the rows that are kept of them, the tokens of their texts, and how many
    of the prompts were cut."""

    prompts: int
    rows: int
    tokens: int
    cut: int


@dataclass(frozen=True)
class Prompts:
    """Prompts in the order of their rows in the shard, the shortest first.

    Attributes:
        ids: int32, of one prompt after the other: all that is attended to.
        offsets: int64 [prompts + 1], where the ids of each begin.
        tokens: int32 [prompts], of the text, with the end token.
        keys: uint8 [prompts, 32].
    """

    ids: Tensor
    offsets: Tensor
    tokens: Tensor
    keys: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


@contextmanager
def _telling(file: Path) -> Iterator[Path]:
    try:
        yield file
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged or missing ({error}); copy it from where the set was planned, or plan a new folder"
        ) from error


def read_prompts(folder: SetFolder, number: int) -> Prompts:
    """The prompts of a shard.

    Raises:
        ValueError: the file is not there or damaged.
    """
    with _telling(folder.prompts(number)) as file:
        return Prompts(**load_file(file))


def read_token_counts(folder: SetFolder, number: int) -> Tensor:
    """int32 [prompts]: the tokens of each prompt's text in a shard, with the end token.

    Raises:
        ValueError: the file is not there or damaged.
    """
    with _telling(folder.prompts(number)) as file, safe_open(file, "pt") as opened:
        return opened.get_tensor("tokens")


def write_prompts(folder: SetFolder, recipe: Recipe, first: int, prompts: Iterable[tuple[int, Prompt]]) -> list[Shard]:
    """Cuts prompts, which come with their rows, into shards; writes the file of each, numbered from ``first``."""
    most_rows = max(recipe.keeping.shard_bytes // recipe.row_bytes, 1)
    return [_write(folder, first + place, piece) for place, piece in enumerate(_pieces(prompts, most_rows))]


def _pieces(prompts: Iterable[tuple[int, Prompt]], most_rows: int) -> Iterator[list[tuple[int, Prompt]]]:
    """Runs of consecutive prompts that have at most so many rows together, or are one prompt."""
    piece: list[tuple[int, Prompt]] = []
    total = 0
    for rows, prompt in prompts:
        if piece and total + rows > most_rows:
            yield piece
            piece, total = [], 0
        piece.append((rows, prompt))
        total += rows
    if piece:
        yield piece


def _write(folder: SetFolder, number: int, piece: list[tuple[int, Prompt]]) -> Shard:
    prompts = [prompt for _, prompt in piece]
    lengths = torch.tensor([len(prompt.ids) // 4 for prompt in prompts])
    tensors = {
        "ids": _tensor(np.int32, (prompt.ids for prompt in prompts)),
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        "tokens": torch.tensor([prompt.tokens for prompt in prompts], dtype=torch.int32),
        "keys": _tensor(np.uint8, (prompt.key for prompt in prompts)).view(-1, 32),
    }
    with lasting(folder.prompts(number)) as partial:
        # By Python, which tells of a full disk as such.
        partial.write_bytes(save(tensors))
    return Shard(
        prompts=len(prompts),
        rows=sum(rows for rows, _ in piece),
        tokens=sum(prompt.tokens for prompt in prompts),
        cut=sum(prompt.is_cut for prompt in prompts),
    )


def _tensor(dtype: type[np.generic], parts: Iterable[bytes]) -> Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(parts), dtype).copy())


def known_keys(folder: SetFolder, shards: int, recipe: Recipe) -> Iterator[list[tuple[int, bytes]]]:
    """(rows, key) of all prompts of the first shards, shard by shard."""
    for number in range(shards):
        prompts = read_prompts(folder, number)
        keys = [bytes(key) for key in prompts.keys.numpy()]
        yield [
            (recipe.feeding.kept_rows(tokens), key) for tokens, key in zip(prompts.tokens.tolist(), keys, strict=True)
        ]
