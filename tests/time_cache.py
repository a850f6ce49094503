"""What the embedding cache takes: a hit, and the encode of prompts that are not kept. Prints ratios and medians.

``OMP_NUM_THREADS=1 python tests/time_cache.py`` takes a minute; the T5-large has random weights.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from checkpoints import spiece_model
from conftest import random_state, write_hf_folder

from nai_t5_core.facts.config import named_config
from nai_t5_core.prompts.cache.key import Settings
from nai_t5_core.prompts.cache.memory import Embedding
from nai_t5_core.prompts.cache.store import Store
from nai_t5_core.prompts.text_encoder import TextEncoder

ROUNDS = 40


def median_ms(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def hits(folder: Path) -> None:
    """Of 77 rows of 4096 numbers: key, look-up and copy."""
    store, settings = Store(folder), Settings("0" * 64, named_config("t5-v1_1-xxl"), "bfloat16", "cpu")
    ids = [*range(3, 79), 1]
    rows = torch.randn(77, 4096).bfloat16()
    store.put(settings.key(ids), rows)
    store.wait()
    assert store.disk is not None
    print(f"a hit in memory: {median_ms(lambda: store.get(settings.key(ids))):.2f} ms")
    print(f"a hit on the disk: {median_ms(lambda: store.disk.get(settings.key(ids))):.2f} ms")  # type: ignore[union-attr]
    print(f"a miss: {median_ms(lambda: store.get(settings.key([*ids, 1]))):.3f} ms")
    writes = count()
    written = median_ms(lambda: store.disk.put(settings.key([3, next(writes)]), Embedding(rows)))  # type: ignore[union-attr]
    print(f"an entry written to the disk, in the background: {written:.1f} ms")


def misses(folder: Path) -> None:
    """Prompts of 32 tokens that are not kept, with and without a cache, by turns."""
    config = named_config("t5-v1_1-large").encoder_only()
    model = write_hf_folder(folder / "large", config, {n: t.bfloat16() for n, t in random_state(config).items()})
    (model / "spiece.model").write_bytes(spiece_model())
    store = Store(folder / "kept")
    plain, cached = (TextEncoder.from_pretrained(model, "bfloat16", "cpu", cache=c) for c in (False, store))
    words = iter(f"number {index}" for index in range(10**6))

    def encode(encoder: TextEncoder) -> None:
        text = next(words) + " of many prompts" * 12
        encoder.encode([text], max_length=32, padding="trim")

    for encoder in (plain, cached) * 5:
        encode(encoder)
    clocks = {"by the clock": time.perf_counter, "of the caller": time.thread_time, "of all threads": time.process_time}
    ratios: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(ROUNDS):
        taken = []
        for encoder in (plain, cached):
            before = [clock() for clock in clocks.values()]
            encode(encoder)
            taken.append([clock() - start for clock, start in zip(clocks.values(), before, strict=True)])
        for name, without, with_cache in zip(clocks, *taken, strict=True):
            ratios[name].append(with_cache / without)
    store.wait()
    told = ", ".join(f"{statistics.median(found):.3f} {name}" for name, found in ratios.items())
    print(f"T5-large, 32 tokens that are not kept, with a cache / without: {told}")


def starts(folder: Path) -> None:
    """Processes that import torch, and that give a kept embedding, by turns."""
    cached = f"from nai_t5_core import TextEncoder as T; e = T.from_pretrained(cache={str(folder / 'tiny')!r}); "
    codes = {"torch": "import torch", "cached": cached + "e.encode(['a cat'])"}
    subprocess.run([sys.executable, "-c", codes["cached"]], check=True)
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(9):
        for name, code in codes.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds[name].append(time.perf_counter() - started)
    ratio = statistics.median(b / a for a, b in zip(seconds["torch"], seconds["cached"], strict=True))
    print(
        f"a process that imports torch: {statistics.median(seconds['torch']):.2f} s; one with a hit: {ratio:.2f} times"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        hits(Path(folder) / "hits")
        misses(Path(folder))
        starts(Path(folder))


if __name__ == "__main__":
    main()
