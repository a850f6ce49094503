"""CUDA graphs, streams and events where there is no card: on the CPU, what a graph records runs again at its replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class PretendedGraph:
    """Operations with the tensors that they were given and gave; a replay writes into the same tensors."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for operation, args, kwargs, result in self.operations:
            again = operation(*args, **kwargs)
            if isinstance(again, Tensor) and again is not result:
                result.copy_(again)


class _Recording(TorchDispatchMode):
    def __init__(self, graph: PretendedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.graph.operations.append((operation, args, kwargs or {}, result))
        return result


class _Stream:
    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self) -> object:
        return object()


def pretend_graphs(monkeypatch: pytest.MonkeyPatch) -> list[PretendedGraph]:
    """Replaces what ``nai_t5_core.backends.cuda.graphs`` asks of torch.cuda; the list gets every graph."""
    graphs: list[PretendedGraph] = []

    def graph() -> PretendedGraph:
        graphs.append(PretendedGraph())
        return graphs[-1]

    @contextmanager
    def recording(graph: PretendedGraph, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        with _Recording(graph):
            yield

    answers = {
        "CUDAGraph": graph,
        "graph": recording,
        "graph_pool_handle": object,
        "Stream": lambda *_: _Stream(),
        "stream": lambda *_: nullcontext(),
        "current_stream": lambda *_: _Stream(),
        "synchronize": lambda *_: None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    return graphs
