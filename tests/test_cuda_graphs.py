"""When graphs are recorded and what they read, on pretended ones; on a card test_cuda_encoder.py has them compute."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretended_graphs import PretendedGraph, pretend_graphs
from torch import Tensor

from nai_t5_core.backends.cuda.device_refusals import missing_triton

if missing := missing_triton():
    pytest.skip(missing, allow_module_level=True)

from nai_t5_core.backends.cuda.attention_shapes import AttentionShape, AttentionShapes
from nai_t5_core.backends.cuda.documents import document_table
from nai_t5_core.backends.cuda.graphs import GraphRunner, GraphSize
from nai_t5_core.bench.doctor import own_kernels
from nai_t5_core.model.packing import DocumentGroup

CPU = torch.device("cpu")
SHAPES = AttentionShapes(((32, AttentionShape(16, 64)),), AttentionShape(64, 32))


class Encoder:
    """Twice the ids; it counts the times that Python runs it."""

    def __init__(self) -> None:
        self.runs = 0
        self.shapes: list[AttentionShape] = []

    def __call__(self, ids: Tensor, documents: Any, watch: Any) -> Tensor:
        self.runs += 1
        self.shapes.append(documents.shape)
        watch.finite.mul_((ids[:1] < 1000).int())
        return 2.0 * ids[:, None].expand(-1, 4)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[PretendedGraph]:
    return pretend_graphs(monkeypatch)


def encode(runner: GraphRunner, encoder: Encoder, tokens: int, first: int = 1) -> tuple[Tensor, int]:
    bucket = runner.bucket(tokens)
    assert bucket is not None
    table = document_table([DocumentGroup(0, 1, tokens, 0, tokens)], runner.shapes(bucket).queries)
    hidden, finite = runner.run(encoder, encoder, bucket, torch.arange(first, first + tokens), table)
    assert torch.equal(hidden[:, 0], 2.0 * torch.arange(first, first + tokens))
    return hidden, int(finite)


@pytest.mark.parametrize("record_at", [1, 2, 3])
def test_a_size_is_recorded_at_the_call_that_is_named(graphs: list[PretendedGraph], record_at: int) -> None:
    runner, encoder = GraphRunner(CPU, shapes=SHAPES, record_at=record_at), Encoder()
    results = []
    for call in range(1, 6):
        results.append(encode(runner, encoder, 20, call)[0])
        assert len(graphs) == (call >= record_at) and bool(runner.sizes) == (call >= record_at)
    # Before a graph is recorded, one run has made ready what cannot be recorded.
    assert encoder.runs == max(record_at, 2)
    assert graphs[0].replays == 6 - record_at
    # Results are copies, which later calls leave alone.
    for call, hidden in enumerate(results, 1):
        assert hidden[0, 0] == 2 * call
    encode(runner, encoder, 200)
    assert len(graphs) == 1 + (record_at == 1)
    assert encoder.shapes[-1] == AttentionShape(64, 32) and encoder.shapes[0] == AttentionShape(16, 64)


@pytest.mark.parametrize("record_at", [1, 3])
def test_what_is_not_finite_is_noted_before_and_after_recording(graphs: list[PretendedGraph], record_at: int) -> None:
    runner, encoder = GraphRunner(CPU, shapes=SHAPES, record_at=record_at), Encoder()
    assert [encode(runner, encoder, 20, first)[1] for first in (1, 1000, 1, 1000, 1)] == [1, 0, 1, 0, 1]


def test_other_weights_are_recorded_anew(graphs: list[PretendedGraph]) -> None:
    runner = GraphRunner(CPU, shapes=SHAPES, record_at=2)
    for encoder in (Encoder(), Encoder()):
        for _ in range(3):
            encode(runner, encoder, 20)
        assert encoder.runs == 2
    assert len(graphs) == 2


def test_a_recording_that_fails_is_tried_again(graphs: list[PretendedGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    runner, encoder = GraphRunner(CPU, shapes=SHAPES), Encoder()
    whole, failures = torch.cuda.graph, [True]

    def failing(*given: Any, **options: Any) -> Any:
        if failures:
            failures.pop()
            raise torch.cuda.OutOfMemoryError("no memory")
        return whole(*given, **options)

    monkeypatch.setattr(torch.cuda, "graph", failing)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        encode(runner, encoder, 20)
    assert runner.sizes == ()
    encode(runner, encoder, 20)
    assert len(runner.sizes) == 1


def test_all_sizes_are_made_ready_and_recorded_on_one_stream(
    graphs: list[PretendedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch keeps memory for cuBLAS on every stream that has multiplied."""
    made: list[Any] = []
    used: list[Any] = []
    stream_of, within = torch.cuda.Stream, torch.cuda.stream
    monkeypatch.setattr(torch.cuda, "Stream", lambda *how: made.append(stream_of(*how)) or made[-1])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: used.append(stream) or within(stream))
    runner, encoder = GraphRunner(CPU, shapes=SHAPES), Encoder()
    for tokens in (20, 200, 500):
        encode(runner, encoder, tokens)
    encode(runner, Encoder(), 20)  # of other weights: what was recorded is forgotten
    assert len(graphs) == 4 and used == made * 4 and len(made) == 1


def test_a_recording_is_launched_once_more_for_its_time(graphs: list[PretendedGraph]) -> None:
    runner, encoder = GraphRunner(CPU, shapes=SHAPES), Encoder()
    encode(runner, encoder, 20)
    encode(runner, encoder, 200)
    for _ in range(3):
        runner.relaunch(27)  # in the same bucket as 20
    assert [graph.replays for graph in graphs] == [4, 1]
    with pytest.raises(ValueError, match="no graph was recorded for 500 tokens"):
        runner.relaunch(500)


def test_layers_are_timed_by_their_graph(graphs: list[PretendedGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    runner, encoder = GraphRunner(CPU, shapes=SHAPES), Encoder()
    encode(runner, encoder, 20)
    on: list[Any] = []

    def seconds_of(launch: Any) -> float:
        launch()
        return 0.002

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(on.append(device)))
    monkeypatch.setattr(own_kernels, "seconds_of_launches", seconds_of)
    timed: Any = SimpleNamespace(graphs=runner, device=CPU)
    assert own_kernels.milliseconds_of(timed, 20) == 2.0 and on == [CPU]
    assert graphs[0].replays == 2


def test_sizes_have_room_for_more_documents_than_one() -> None:
    assert GraphSize.holding(64, 3, 16) == GraphSize(64, 8)
    assert GraphSize.holding(64, 9, 16) == GraphSize(64, 16)
    assert GraphSize.holding(512, 8, 64) == GraphSize(512, 16)
