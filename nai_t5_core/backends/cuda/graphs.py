"""CUDA graphs of an encoder: one for each of a few sizes, recorded at first use, run on what is copied into it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from nai_t5_core.backends.cuda.documents import COLUMNS, query_block
from nai_t5_core.backends.cuda.launches import Documents, Watch

# Tokens of a row. Up to a few hundred the weights are read in the same time, beyond that steps of a half at most.
GRAPH_BUCKETS = (16, 32, 64, 128, 256, 384, 512, 768, 1024)

# Ids [tokens] int32, what attends to what, and where to note faults, to hidden states [tokens, d_model].
Encode = Callable[[Tensor, Documents, Watch], Tensor]


@dataclass(frozen=True)
class GraphSize:
    """Of a recording: tokens, and blocks of queries, which the document table has rows for."""

    tokens: int
    blocks: int

    @classmethod
    def holding(cls, tokens: int, blocks: int) -> GraphSize:
        """With room for twice as many blocks as a document of all tokens has; where that is too little, doubled."""
        room = 2 * -(-tokens // query_block(tokens))
        while room < blocks:
            room *= 2
        return cls(tokens, room)


class _Inputs:
    """What a recording reads: the number of tokens, the document table and the ids, one behind the other in memory."""

    def __init__(self, size: GraphSize, device: torch.device) -> None:
        self.size = size
        self._table_end = 1 + size.blocks * COLUMNS
        self.all = torch.zeros(self._table_end + size.tokens, dtype=torch.int32, device=device)
        self.count = self.all[:1]
        self.documents = Documents(self.all[1 : self._table_end].view(-1, COLUMNS), query_block(size.tokens))
        self.ids = self.all[self._table_end :]

    def fill(self, ids: Tensor, table: Tensor) -> None:
        """With ids on the CPU or the device, and a table on the CPU; nothing waits for the device."""
        surplus = self.size.blocks * COLUMNS - table.numel()
        parts = [torch.tensor([len(ids)], dtype=torch.int32), pad(table.flatten(), (0, surplus))]
        if ids.is_cuda:
            # What is behind them are ids of earlier calls, which are as good as any.
            self.ids[: len(ids)].copy_(ids)
        else:
            parts.append(ids.to(torch.int32))
        given = torch.cat(parts).pin_memory()
        self.all[: len(given)].copy_(given, non_blocking=True)


class _Place:
    """Where recordings are made: memory that they share, and a stream on which nothing else is done."""

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)


class _Recording:
    """The launches of one size, and where they read and write."""

    def __init__(self, size: GraphSize, encode: Encode, device: torch.device, place: _Place) -> None:
        self.inputs = _Inputs(size, device)
        self.finite = torch.ones(1, dtype=torch.int32, device=device)
        before = torch.cuda.current_stream(device)
        aside = torch.cuda.Stream(device)
        aside.wait_stream(before)
        with torch.cuda.stream(aside):
            # Compiles the kernels, and has cuBLAS choose its own and take its memory: neither can be recorded.
            self._run(encode)
        before.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, place.pool, place.stream, capture_error_mode="thread_local"):
            self.hidden = self._run(encode)

    def _run(self, encode: Encode) -> Tensor:
        self.finite.fill_(1)
        return encode(self.inputs.ids, self.inputs.documents, Watch(self.finite, self.inputs.count))

    def __call__(self, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the hidden states [tokens, d_model], and of the note on faults: the next call writes over both."""
        self.inputs.fill(ids, table)
        self.graph.replay()
        return self.hidden[: len(ids)].clone(), self.finite.clone()


class GraphRunner:
    """Runs rows of up to the largest bucket from recordings that share their memory.

    A call from another stream or thread waits for the one before it.
    """

    def __init__(self, device: torch.device, buckets: tuple[int, ...] = GRAPH_BUCKETS) -> None:
        self.device = device
        self.buckets = buckets
        self._recordings: dict[GraphSize, _Recording] = {}
        self._recorded_from: object = None
        self._place: _Place | None = None
        self._done: torch.cuda.Event | None = None
        self._lock = threading.Lock()

    @property
    def sizes(self) -> tuple[GraphSize, ...]:
        """Of what is recorded."""
        return tuple(self._recordings)

    def bucket(self, tokens: int) -> int | None:
        """The tokens of the recording that takes such a row; None where it is longer than the largest."""
        return next((bucket for bucket in self.buckets if tokens <= bucket), None)

    def run(self, encode: Encode, source: object, bucket: int, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [tokens, d_model], and int32 [1], 1 where they are finite.

        Args:
            encode: what is recorded. It is called at the first use of a size alone.
            source: what ``encode`` reads beside its arguments. From another object everything is recorded anew.
            bucket: of :meth:`bucket`.
            ids: [tokens] integers, on the CPU or the device.
            table: of documents, [blocks, 5] on the CPU, for blocks of the bucket's size.
        """
        size = GraphSize.holding(bucket, len(table))
        with self._lock:
            if source is not self._recorded_from:
                self._forget()
                self._recorded_from = source
            stream = torch.cuda.current_stream(self.device)
            if self._done is not None:
                stream.wait_event(self._done)
            if size not in self._recordings:
                self._recordings[size] = self._record(size, encode)
            result = self._recordings[size](ids, table)
            self._done = stream.record_event()
            return result

    def _record(self, size: GraphSize, encode: Encode) -> _Recording:
        if self._place is None:
            self._place = _Place(self.device)
        # Inference tensors could be filled under inference mode alone.
        with torch.inference_mode(False), torch.no_grad():
            return _Recording(size, encode, self.device, self._place)

    def _forget(self) -> None:
        """Lets recordings and their memory go, when the device is done with them."""
        if self._recordings:
            torch.cuda.synchronize(self.device)
        self._recordings.clear()
        self._place = None
