"""The measurements of caption sets: they measure what they say, on small sets."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pyarrow")

from toy_captions import ENCODER

from nai_t5_core.bench import planning, storing
from nai_t5_core.datasets.recipe import Keeping


def test_planning(tmp_path: Path) -> None:
    planning.write_captions(tmp_path / "captions.txt", ["a red fox", "two dogs"], 50)
    found = planning.measure(tmp_path / "captions.txt", ENCODER, "wan", 1, tmp_path / "set")
    assert (tmp_path / "captions.txt").read_text().splitlines()[48:] == ["a red fox, 48", "two dogs, 49"]
    assert found["captions"] == found["unique prompts"] == 50 and found["shards"] == 1
    assert all(found[name] > 0 for name in ("captions a second", "seconds to plan again", "tokens"))


@pytest.mark.skipif(sys.platform != "linux", reason="read of /proc")
def test_memory_is_that_of_this_process_and_its_children() -> None:
    memory = planning.PeakMemory()
    with memory.watched():
        held = torch.ones(50_000_000, dtype=torch.int32)
        time.sleep(planning._BETWEEN_LOOKS * 3)
    assert memory.bytes > held.nbytes


# A header, and 44 bytes of key and places for a prompt; in 8 bits a scale for a row, and one for a channel.
KEPT: dict[tuple[Any, Any], tuple[float, float]] = {
    ("bfloat16", "none"): (1 + 44 / (20 * 256 * 2), 0.0),
    ("int8", "none"): (0.5 + (4 + 44 / 20) / (256 * 2) + 4 / (2 * 20 * 50), 0.012),
}


@pytest.mark.parametrize(("store", "compress"), KEPT)
def test_bytes_on_disk(store: Any, compress: Any, tmp_path: Path) -> None:
    embeddings = [torch.randn(20, 256).bfloat16() for _ in range(50)]
    found = storing.measure(embeddings, Keeping(store, compress), tmp_path / "shard.safetensors")
    nbytes, most_error = KEPT[store, compress]
    assert nbytes <= found["bytes"] < nbytes + 0.003
    assert 0 <= found["error"] <= most_error and min(found["written"], found["read"]) > 0


@pytest.mark.parametrize("width", [256, 1024, 4096])
def test_from_a_width_on_sets_are_as_small_as_promised(width: int, tmp_path: Path) -> None:
    embeddings = [torch.randn(18, width).bfloat16() for _ in range(200)]
    promised: dict[tuple[Any, Any], float] = {
        ("bfloat16", "none"): 1.01,
        ("int8", "none"): 0.52,
        ("bfloat16", "zstd"): 0.75,
        ("bfloat16", "zlib"): 0.75,
    }
    for kept, most in promised.items():
        assert storing.measure(embeddings, Keeping(*kept), tmp_path / "shard.safetensors")["bytes"] <= most
