"""CUDA graphs of an encoder: one for each of a few sizes, recorded at first use; inputs are copied into its memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from nai_t5_core.backends.cuda.attention_shapes import USUAL, AttentionShape, AttentionShapes
from nai_t5_core.backends.cuda.documents import COLUMNS
from nai_t5_core.backends.cuda.launches import Documents, Watch

# Tokens of a packed row. Up to a few hundred, reading the weights takes the most time, so that padding costs little;
# the larger sizes are at most 1.5 times the one before.
GRAPH_BUCKETS = (16, 32, 64, 128, 256, 384, 512, 768, 1024)


def bucket_of(tokens: int, buckets: tuple[int, ...] = GRAPH_BUCKETS) -> int | None:
    """The smallest bucket that holds a packed row of ``tokens`` tokens; None for a row longer than the largest."""
    return next((bucket for bucket in buckets if tokens <= bucket), None)


# Ids [tokens] int32, the documents, and where to note that a value is not finite, to hidden states [tokens, d_model].
Encode = Callable[[Tensor, Documents, Watch], Tensor]


@dataclass(frozen=True)
class GraphSize:
    """The size of a recording: tokens, and rows of the document table, one for each block of queries."""

    tokens: int
    blocks: int

    @classmethod
    def holding(cls, tokens: int, blocks: int, queries: int) -> GraphSize:
        """Room for twice as many blocks of ``queries`` as one document of all tokens would have, doubled until
        ``blocks`` fit.
        """
        room = 2 * -(-tokens // queries)
        while room < blocks:
            room *= 2
        return cls(tokens, room)


class _Inputs:
    """What a recording reads: the number of tokens, the document table and the ids, in this order in one tensor."""

    def __init__(self, size: GraphSize, shape: AttentionShape, device: torch.device) -> None:
        self.size = size
        self._table_end = 1 + size.blocks * COLUMNS
        self.all = torch.zeros(self._table_end + size.tokens, dtype=torch.int32, device=device)
        self.count = self.all[:1]
        self.documents = Documents(self.all[1 : self._table_end].view(-1, COLUMNS), shape)
        self.ids = self.all[self._table_end :]

    def fill(self, ids: Tensor, table: Tensor) -> None:
        """Copies in ids, from the CPU or the device, and a table from the CPU, without waiting for the device."""
        surplus = self.size.blocks * COLUMNS - table.numel()
        parts = [torch.tensor([len(ids)], dtype=torch.int32), pad(table.flatten(), (0, surplus))]
        if ids.is_cuda:
            # After them there are still ids of earlier calls: valid ids, whose rows are not read.
            self.ids[: len(ids)].copy_(ids)
        else:
            parts.append(ids.to(torch.int32))
        given = torch.cat(parts).pin_memory()
        self.all[: len(given)].copy_(given, non_blocking=True)


class _Place:
    """The memory pool that all recordings share, and the stream on which they are made ready and recorded.

    The stream is used for nothing else, and stays: torch keeps 32 MB for cuBLAS on each stream that ever multiplied.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)


class _Recording:
    """The CUDA graph of one size, with its inputs and outputs; recorded at a call of its size, the first or a later."""

    def __init__(self, inputs: _Inputs, device: torch.device, place: _Place) -> None:
        self.inputs, self.device, self.place = inputs, device, place
        self.finite = torch.ones(1, dtype=torch.int32, device=device)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def record(self, encode: Encode) -> None:
        """Records the graph, unless that was done."""
        if self.graph is not None:
            return
        graph, place = torch.cuda.CUDAGraph(), self.place
        if not self.calls:
            before = torch.cuda.current_stream(self.device)
            place.stream.wait_stream(before)
            with torch.cuda.stream(place.stream):
                # A first run: Triton compiles, and cuBLAS chooses kernels and allocates, which cannot be recorded.
                self._run(encode)
            before.wait_stream(place.stream)
        with torch.cuda.graph(graph, place.pool, place.stream, capture_error_mode="thread_local"):
            self.hidden = self._run(encode)
        self.graph = graph

    def launch(self, encode: Encode, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """As a call, by launching every kernel: the same numbers as from the graph, which is not needed."""
        self.inputs.fill(ids, table)
        return self._run(encode)[: len(ids)], self.finite.clone()

    def _run(self, encode: Encode) -> Tensor:
        self.finite.fill_(1)
        return encode(self.inputs.ids, self.inputs.documents, Watch(self.finite, self.inputs.count))

    def __call__(self, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [tokens, d_model] and ``finite`` [1]: copies, since the next call overwrites the originals."""
        assert self.graph is not None
        self.inputs.fill(ids, table)
        self.graph.replay()
        return self.hidden[: len(ids)].clone(), self.finite.clone()


class GraphRunner:
    """Runs packed rows of up to the largest bucket from CUDA graphs that share one memory pool.

    A call from another stream or thread waits for the one before it.

    Args:
        shapes: how attention is divided among programs.
        record_at: the call of a size at which its graph is recorded; in those before, every kernel is launched.
    """

    def __init__(
        self,
        device: torch.device,
        buckets: tuple[int, ...] = GRAPH_BUCKETS,
        shapes: AttentionShapes = USUAL,
        record_at: int = 1,
    ) -> None:
        self.device = device
        self.buckets = buckets
        self.shapes = shapes
        self.record_at = record_at
        self._recordings: dict[GraphSize, _Recording] = {}
        self._recorded_from: object = None
        self._place: _Place | None = None
        self._done: torch.cuda.Event | None = None
        self._lock = threading.Lock()

    @property
    def sizes(self) -> tuple[GraphSize, ...]:
        """The sizes that have been recorded."""
        return tuple(size for size, recording in self._recordings.items() if recording.graph is not None)

    def bucket(self, tokens: int) -> int | None:
        """See :func:`bucket_of`."""
        return bucket_of(tokens, self.buckets)

    def run(self, encode: Encode, source: object, bucket: int, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [tokens, d_model], and int32 [1], 1 where they are finite.

        Args:
            encode: the function that is recorded; it is called only until the graph of a size is recorded.
            source: the object that ``encode`` reads weights from. If it is another than before, all is recorded anew.
            bucket: the result of :meth:`bucket`.
            ids: [tokens] integers, on the CPU or the device.
            table: of documents, [blocks, 5] on the CPU, for blocks of the bucket's size.
        """
        shape = self.shapes(bucket)
        size = GraphSize.holding(bucket, len(table), shape.queries)
        with self._lock:
            if source is not self._recorded_from:
                self._forget()
                self._recorded_from = source
            stream = torch.cuda.current_stream(self.device)
            if self._done is not None:
                stream.wait_event(self._done)
            result = self._result(self._recording(size, shape), encode, ids, table)
            self._done = stream.record_event()
            return result

    def relaunch(self, tokens: int) -> None:
        """Launches a recording for rows of so many tokens once more, on what it was given last: to time it alone.

        Raises:
            ValueError: none was recorded.
        """
        bucket = self.bucket(tokens)
        found = next((each for size, each in self._recordings.items() if size.tokens == bucket and each.graph), None)
        if found is None or found.graph is None:
            raise ValueError(f"no graph was recorded for {tokens} tokens; encode such a row before")
        with self._lock:
            stream = torch.cuda.current_stream(self.device)
            if self._done is not None:
                stream.wait_event(self._done)
            found.graph.replay()
            self._done = stream.record_event()

    def _recording(self, size: GraphSize, shape: AttentionShape) -> _Recording:
        if self._place is None:
            self._place = _Place(self.device)
        if size not in self._recordings:
            # Outside inference mode: inference tensors could only be filled under inference mode.
            with torch.inference_mode(False):
                self._recordings[size] = _Recording(_Inputs(size, shape, self.device), self.device, self._place)
        return self._recordings[size]

    def _result(self, recording: _Recording, encode: Encode, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        if recording.calls + 1 < self.record_at:
            result = recording.launch(encode, ids, table)
        else:
            with torch.inference_mode(False), torch.no_grad():
                recording.record(encode)
            result = recording(ids, table)
        recording.calls += 1
        return result

    def _forget(self) -> None:
        """Frees all recordings and their memory, after the device has finished with them."""
        if self._recordings:
            torch.cuda.synchronize(self.device)
        self._recordings.clear()
        if self._place is not None:
            self._place.pool = torch.cuda.graph_pool_handle()
