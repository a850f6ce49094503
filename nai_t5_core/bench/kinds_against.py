"""Our encoder beside llama.cpp's on the same GGUF file, of each of some kinds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.bench.gguf_files import write_gguf
from nai_t5_core.bench.llama_cpp_peer import LlamaCppEncoder
from nai_t5_core.bench.peers import random_state
from nai_t5_core.bench.speed.tables import Table
from nai_t5_core.facts.config import T5Config
from nai_t5_core.weights.load import load_encoder

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AgainstRow:
    """One length of one kind. ``difference`` is the largest between the two, relative to the largest value."""

    kind: str
    tokens: int
    ours: float
    theirs: float
    difference: float

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}


@torch.no_grad()
def measure_against_llama_cpp(
    config: T5Config,
    kinds: Sequence[str],
    dtype: torch.dtype = torch.bfloat16,
    tokens: Sequence[int] = (32, 128, 512),
    repeats: int = 5,
    progress: Callable[[str], None] = lambda _: None,
) -> list[AgainstRow]:
    """Milliseconds of one prompt, medians; both encoders in this process, in turn, with torch's number of threads.

    Args:
        kinds: by ggml's names, see :func:`nai_t5_core.bench.gguf_files.write_gguf`.
        dtype: what ours computes in.

    Raises:
        ValueError: llama-cpp-python or gguf is not installed, or a kind that is not known.
    """
    state = random_state(config)
    rows = []
    for kind in kinds:
        progress(kind)
        with TemporaryDirectory() as folder:
            path = write_gguf(Path(folder) / "t5.gguf", config, state, kind)
            ours, theirs = load_encoder(path, dtype, "cpu"), LlamaCppEncoder(path)
            rows += [_row(kind, ours, theirs, _ids(config, count), repeats) for count in tokens]
    return rows


def against_table(rows: Sequence[AgainstRow]) -> tuple[Table, list[str]]:
    """Times of one encode, and how far the results are apart."""
    headings = ("kind", "tokens", "comfy-nai-t5, ms", "llama.cpp, ms", "times as long", "difference")
    cells = [
        (
            row.kind,
            str(row.tokens),
            f"{row.ours:.1f}",
            f"{row.theirs:.1f}",
            f"{row.ratio:.2f}×",
            f"{row.difference:.1e}",
        )
        for row in rows
    ]
    return Table("The same files by llama.cpp", headings, cells), []


def _apart(row: AgainstRow) -> tuple[str, str]:
    return f"{row.ratio:.2f}×", f"{row.difference:.1e}"


def _row(kind: str, ours: Encode, theirs: Encode, ids: Tensor, repeats: int) -> AgainstRow:
    mine, found = ours(ids).float(), theirs(ids)
    difference = float((mine - found).abs().max() / found.abs().max())
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for encode, taken in zip((ours, theirs), times, strict=True):
            began = time.perf_counter()
            encode(ids)
            taken.append(1e3 * (time.perf_counter() - began))
    mine_ms, theirs_ms = map(statistics.median, times)
    return AgainstRow(kind, ids.shape[1], mine_ms, theirs_ms, difference)


def _ids(config: T5Config, count: int) -> Tensor:
    return torch.randint(3, config.vocab_size, (1, count), generator=torch.Generator().manual_seed(count))
