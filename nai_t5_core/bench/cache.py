"""What the embedding cache takes: a hit, a prompt that is not kept, and the start of a process that has one that is."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from nai_t5_core.bench.peers import random_state
from nai_t5_core.bench.speed.results import Spread
from nai_t5_core.facts.config import T5Config, config_to_hf, named_config
from nai_t5_core.prompts.cache.encoding import CachedEncoding
from nai_t5_core.prompts.cache.key import Settings
from nai_t5_core.prompts.cache.memory import Embedding
from nai_t5_core.prompts.cache.store import Store
from nai_t5_core.prompts.stack_encoding import StackEncoding
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.weights.formats import write_safetensors
from nai_t5_core.weights.hub import EMBEDDED_MODEL

# Of a hit: the rows of a T5-XXL, for as many tokens as CLIP has.
_ROWS, _WIDTH = 77, 4096
# Of a prompt that is not kept.
_TOKENS = 32
_WARM_UP = 5


@dataclass(frozen=True)
class CacheTimes:
    """Milliseconds, and ratios of one time to another.

    Attributes:
        hit_memory, hit_disk: from the ids to the rows [77, 4096] in bfloat16; of the disk with the checksum.
        miss: the look into memory and folder for a prompt that is not there.
        write: an entry onto the disk, which is done in the background.
        encode: of 32 tokens without a cache.
        cost: of prompts of 32 tokens that are not kept, the time with a store of that kind to that without.
        start: whole processes that give a kept embedding (a program with a TextEncoder, and the command), to those that
            only import torch; by the clock.
    """

    hit_memory: Spread
    hit_disk: Spread
    miss: Spread
    write: Spread
    encode: Spread
    cost: dict[str, Spread]
    start: dict[str, Spread]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_cache(
    size: str | T5Config = "t5-v1_1-large",
    rounds: int = 41,
    starts: int = 15,
    progress: Callable[[str], None] = lambda _: None,
) -> CacheTimes:
    """Measures on the CPU, with random weights and in a temporary folder.

    Args:
        size: of the encoder of which prompts are encoded that are not kept.
        rounds: measurements of each kind; all ways are measured in turn in each round.
        starts: rounds of processes; 0 for none.

    Raises:
        ValueError: an unknown size, or fewer than one round.
    """
    config = (named_config(size) if isinstance(size, str) else size).encoder_only()
    if rounds < 1 or starts < 0:
        raise ValueError(f"rounds={rounds}, starts={starts}; at least 1 round must count, and 0 starts")
    with tempfile.TemporaryDirectory() as folder:
        progress("hits")
        hits = _hits(Path(folder) / "hits", rounds)
        progress("prompts that are not kept")
        encode, cost = _misses(Path(folder), config, rounds)
        progress("starts")
        start = _starts(Path(folder) / "starts", starts) if starts else {}
    return CacheTimes(**hits, encode=encode, cost=cost, start=start)


def _hits(folder: Path, rounds: int) -> dict[str, Spread]:
    store, settings = Store(folder), Settings("0" * 64, named_config("t5-v1_1-xxl"), "bfloat16", "cpu")
    disk: Any = store.disk
    ids, rows = [*range(3, _ROWS + 2), 1], torch.randn(_ROWS, _WIDTH).bfloat16()
    store.put(settings.key(ids), rows)
    store.wait()
    number = count(3)
    return {
        "hit_memory": _times(lambda: store.get(settings.key(ids)), rounds),
        "hit_disk": _times(lambda: disk.get(settings.key(ids)), rounds),
        "miss": _times(lambda: store.get(settings.key([next(number), 1])), rounds),
        "write": _times(lambda: disk.put(settings.key([2, next(number)]), Embedding(rows)), rounds),
    }


def _times(call: Callable[[], object], rounds: int) -> Spread:
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        taken.append((time.perf_counter() - started) * 1e3)
    return Spread.of(taken)


def _misses(folder: Path, config: T5Config, rounds: int) -> tuple[Spread, dict[str, Spread]]:
    """One model encodes new prompts without a cache, and with stores in memory and on the disk, by turns."""
    stores = {"memory": Store(None), "disk": Store(folder / "kept")}
    loaded = TextEncoder.from_pretrained(
        _random_model(folder / "model", config), device="cpu", tokenizer=EMBEDDED_MODEL, cache=stores["disk"]
    )
    on_disk: Any = loaded._encoding
    ready = StackEncoding(loaded.stack)
    settings, place = on_disk.settings, torch.device("cpu")
    in_memory = CachedEncoding(settings, lambda: (ready, settings), stores["memory"], place, "", lambda scales: None)
    ways = {"none": ready, "memory": in_memory, "disk": on_disk}
    encoders = {name: TextEncoder(encoding, loaded.tokenizer) for name, encoding in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in encoders}
    for turn in range(_WARM_UP + rounds):
        order = list(encoders)
        # Each is as often the first of a round as the others.
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            text = f"{name} {turn}" + " of many prompts" * _TOKENS
            started = time.perf_counter()
            encoders[name].encode([text], max_length=_TOKENS, padding="trim")
            taken[name].append((time.perf_counter() - started) * 1e3)
    misses = {store.counts.misses for store in stores.values()}
    if misses != {_WARM_UP + rounds} or any(store.counts.hits for store in stores.values()):
        raise RuntimeError(f"prompts that are new were found in the cache: {stores}")
    stores["disk"].wait()
    counted = {name: times[_WARM_UP:] for name, times in taken.items()}
    return Spread.of(counted["none"]), {name: Spread.of_ratio(counted[name], counted["none"]) for name in stores}


def _random_model(folder: Path, config: T5Config) -> Path:
    folder.mkdir()
    state = random_state(config, dtype=torch.bfloat16)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    write_safetensors(folder / "model.safetensors", layout, state.items(), {})
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    return folder


def _starts(folder: Path, rounds: int) -> dict[str, Spread]:
    """Processes by turns; all import the same torch."""
    library = f"from nai_t5_core import TextEncoder as T; T.from_pretrained(cache={str(folder)!r}).encode(['a cat'])"
    ways = {
        "torch": ["-c", "import torch"],
        "a program": ["-c", library],
        "nai-t5 encode": ["-m", "nai_t5_core.cli", "encode", "a cat", "--cache-dir", str(folder), "--json"],
    }
    _seconds(ways["a program"])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, arguments in ways.items():
            seconds[name].append(_seconds(arguments))
    plain = seconds.pop("torch")
    return {name: Spread.of_ratio(taken, plain) for name, taken in seconds.items()}


def _seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started
