"""Threads that share a T5: each gets what it would get alone, from the very first call on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from comfy_toys import V1_1, needs_8_bits, require_comfyui, stock, toy_file
from conftest import padding_mask
from test_layouts import ours_of, t5_of

require_comfyui()

THREADS, CALLS, FRESH = 8, 3, 10
IDS = torch.randint(3, V1_1.vocab_size, (2, 12), generator=torch.Generator().manual_seed(3))
MASK = padding_mask([12, 5], 12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["separate", "fused", "packed", pytest.param("int8", marks=needs_8_bits)])
def test_threads_get_what_one_gets(layout: str, dtype: str, tmp_path: Path) -> None:
    theirs = stock(toy_file(tmp_path, V1_1), "mochi")

    def fresh() -> Any:
        return t5_of(ours_of(theirs, layout, dtype)).stack

    @torch.inference_mode()
    def encode(stack: Any, start: Barrier | None = None) -> list[torch.Tensor]:
        out = []
        for _ in range(CALLS):
            if start is not None:
                start.wait()
            out.append(stack(IDS, MASK, padding="skip"))
        return out

    expected = encode(fresh())
    assert all(torch.equal(found, expected[0]) for found in expected)
    for _ in range(FRESH):
        stack, start = fresh(), Barrier(THREADS)
        with ThreadPoolExecutor(THREADS) as threads:
            found = list(threads.map(lambda _, stack=stack, start=start: encode(stack, start), range(THREADS)))
        assert all(torch.equal(one, expected[0]) for calls in found for one in calls)
