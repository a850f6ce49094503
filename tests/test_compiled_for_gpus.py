"""Our kernels, and what torch makes of our encoder, compiled for GPUs that are not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cards import AMD_CARDS, CARDS, NEWER_CARDS
from compile_table import compiled

from nai_t5_core.backends.cuda.device_refusals import missing_triton
from nai_t5_core.model.attention_choice import AUTOMATIC_FLEX_DTYPES, choose_attention

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_triton() is not None, reason=str(missing_triton())),
]
for_cuda = pytest.mark.skipif(
    torch.version.cuda is None, reason="this torch is built without CUDA: it compiles nothing"
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))


def out_of_step(usages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that do not wait for the launch before, and let the next one start, where launches overlap; or do else."""
    return [
        usage for usage in usages if (usage["waits"] > 0, usage["starts"] > 0) != (usage.get("overlaps", False),) * 2
    ]


def beyond(usages: list[dict[str, Any]], capability: int | str) -> list[dict[str, Any]]:
    """Those that spill registers, or that the card refuses to start."""
    limits: dict[int | str, int] = {name: card.shared for name, card in CARDS.items()}
    most = (limits | NEWER_CARDS | {name: shared for name, (_, shared) in AMD_CARDS.items()})[capability]
    return [usage for usage in usages if usage["STACK"] or usage["shared"] > most]


@pytest.mark.parametrize("capability", [*CARDS, *NEWER_CARDS, *AMD_CARDS])
def test_our_kernels(capability: int | str) -> None:
    usages = compiled("compile_for_gpus.py", capability)
    tiles = set() if capability in AMD_CARDS else {"multiply_tiles"}
    assert {usage["kernel"] for usage in usages} == {"attend", "add_norm", "gate", "multiply", *tiles}
    assert beyond(usages, capability) == [] and out_of_step(usages) == []
    assert any(usage["waits"] for usage in usages) == (capability in (90, *NEWER_CARDS))


@pytest.mark.parametrize("capability", [*CARDS, *NEWER_CARDS])
def test_our_kernels_for_8_bits(capability: int) -> None:
    usages = compiled("compile_bytes_for_gpus.py", capability)
    between = {"round_rows", "number_sums", "gate_in_bytes", "add_norm"}
    assert {usage["kernel"] for usage in usages} == {"multiply_bytes", "multiply_int8", "unpack_bytes", *between}
    assert beyond(usages, capability) == [] and out_of_step(usages) == []
    overlapping = {usage["kernel"] for usage in usages if usage["waits"]}
    expected = {"multiply_bytes", "multiply_int8", "round_rows", "add_norm"}
    assert overlapping == (expected if capability in (90, *NEWER_CARDS) else set())


@for_cuda
@pytest.mark.parametrize("capability", CARDS)
def test_flex_and_compiled_encoders(capability: int) -> None:
    """In float32 flex spills, which is why only a caller who names it gets it there."""
    usages = compiled("compile_graphs_for_gpus.py", capability)
    assert beyond([usage for usage in usages if "float32" not in usage["graph"]], capability) == []
    for graph in {usage["graph"] for usage in usages}:
        assert any("flex_attention" in usage["kernel"] for usage in usages if usage["graph"] == graph)
    assert beyond([usage for usage in usages if "float32" in usage["graph"]], capability)
    assert torch.float32 not in AUTOMATIC_FLEX_DTYPES
    assert choose_attention("cuda", 1000, torch.float32) == "sdpa"
