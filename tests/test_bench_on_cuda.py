"""The benchmark on a CUDA device, as far as it goes without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, random_state
from pretended_cuda import PretendedCuda
from torch import Tensor

from nai_t5_core.backends import choose
from nai_t5_core.backends.cuda.runner import CudaRunner
from nai_t5_core.bench.clock import timed_once
from nai_t5_core.bench.parity_report import OWN
from nai_t5_core.bench.speed import CASES, timing, variants
from nai_t5_core.bench.speed.timing import Bench, run_case
from nai_t5_core.bench.speed.variants import BY_TORCH

CONFIG = TOY_CONFIGS["v1.1"].encoder_only()
CUDA = torch.device("cuda", 0)


def test_the_device_is_idle_before_a_call_and_waited_for_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", turns.append)
    duration, result = timed_once(lambda: turns.append("call"), CUDA)
    assert result is None and turns == [CUDA, "call", CUDA]
    assert 0 < duration.host < duration.whole


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    with torch.no_grad(), PretendedCuda() as pretended:
        yield pretended


@pytest.mark.parametrize("refusal", [None, "the GPU is too old"])
def test_ours_is_what_text_encoder_runs(
    device: PretendedCuda, refusal: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "refuses_for_good", lambda _: refusal)
    monkeypatch.setattr(CudaRunner, "refusal", lambda *_: refusal)
    stack: Any = device.put(build_stack(CONFIG, random_state(CONFIG), torch.float16))
    made = variants._own_variants(stack, variants.Wanted())
    assert list(made) == ([OWN] if refusal else [OWN, BY_TORCH])
    ours: Any = made[OWN](stack)
    assert isinstance(ours.runner, CudaRunner) == (refusal is None)


def test_ours_takes_ids_from_the_cpu_and_others_from_the_device(
    device: PretendedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: dict[str, set[str]] = {}

    def encoder(name: str) -> Any:
        def encode(case: Any, ids: Tensor, mask: Tensor) -> Tensor:
            places.setdefault(name, set()).update((ids.device.type, mask.device.type))
            return torch.ones(*ids.shape, 2)

        return encode

    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(timing, "peak_bytes", lambda *_: 0)
    monkeypatch.setattr(timing, "count_flops", lambda _: 0)
    encoders = {name: encoder(name) for name in (OWN, BY_TORCH, "transformers")}
    with torch.no_grad():
        run_case(CASES[3], Bench(CONFIG, encoders, None, {}, None, CUDA, 1, 0, lambda _: None))
    assert places == {OWN: {"cpu"}, BY_TORCH: {"cpu"}, "transformers": {"cuda"}}
