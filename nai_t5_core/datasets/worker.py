"""One shard in, one file out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from nai_t5_core.datasets.folder import SetFolder
from nai_t5_core.datasets.prompt_files import Prompts, read_prompts
from nai_t5_core.datasets.recipe import Recipe
from nai_t5_core.datasets.shard_files import Encoded, write_shard
from nai_t5_core.float16.guard import NotFiniteError, encode_guarded
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.inputs import OutsideVocabularyError
from nai_t5_core.prompts.text_encoder import DEFAULT_TOKEN_BUDGET

# What is wrong with a prompt alone; every other error ends the run.
_OF_A_PROMPT = (NotFiniteError, OutsideVocabularyError)


@dataclass(frozen=True)
class Progress:
    """What a worker has done since it last told.

    Attributes:
        tokens: that were encoded, of the text.
        written: the number of a shard that is complete now, its bytes, and its failures; None while one is encoded.
    """

    tokens: int = 0
    written: int | None = None
    nbytes: int = 0
    failures: int = 0


Told = Callable[[Progress], None]


class Worker:
    """Encodes shards of a set with one encoder.

    Args:
        token_budget: rows that are encoded at a time. Where memory ends, it is halved.
    """

    def __init__(
        self, folder: SetFolder, recipe: Recipe, stack: T5EncoderStack, token_budget: int = DEFAULT_TOKEN_BUDGET
    ) -> None:
        self.folder = folder
        self.recipe = recipe
        self.stack = stack
        self.token_budget = token_budget
        self._scales = stack.scales
        self._encoding = Lock()

    def run(self, numbers: Iterable[int], told: Told = lambda progress: None) -> None:
        """Makes the files of these shards, one after the other; while one is written, the next is encoded.

        Threads may call it at once: one of them encodes, and others write.

        Raises:
            OSError, CheckpointError: a file cannot be written, or the disk is full. Shards that are complete stay.
            ValueError: the plan's file of a shard is damaged, scales of float16 had to be tightened, or all prompts of
                a shard fail.
        """
        with ThreadPoolExecutor(1) as writer:
            writing: Future[Progress] | None = None
            for number in numbers:
                with self._encoding:
                    encoded = self._encode(read_prompts(self.folder, number), told)
                _refuse_nothing_but_failures(number, encoded)
                if writing is not None:
                    told(writing.result())
                writing = writer.submit(self._write, number, encoded)
            if writing is not None:
                told(writing.result())

    def _write(self, number: int, encoded: Encoded) -> Progress:
        nbytes = write_shard(self.folder.shard(number), encoded, self.recipe.keeping)
        return Progress(written=number, nbytes=nbytes, failures=len(encoded.failures))

    def _encode(self, prompts: Prompts, told: Told) -> Encoded:
        feeding = self.recipe.feeding
        tokens = prompts.tokens.tolist()
        kept = [feeding.kept_rows(count) for count in tokens]
        rows = torch.empty(sum(kept), self.recipe.d_model, dtype=self.stack.dtype)
        failures: dict[str, str] = {}
        done = start = 0
        while start < len(prompts):
            stop = self._fitting(kept, start)
            try:
                states = self.embed(prompts, kept, start, stop)
            except (RuntimeError, MemoryError) as error:
                if stop == start + 1 or not _is_want_of_memory(error):
                    raise
                self.token_budget //= 2
                continue
            except _OF_A_PROMPT:
                states = self._one_by_one(prompts, kept, start, stop, failures)
            rows[done : done + len(states)] = states
            done += len(states)
            told(Progress(tokens=sum(tokens[start:stop])))
            start = stop
        self._refuse_tightened()
        return Encoded(
            rows[:done],
            torch.tensor([0, *kept]).cumsum(0),
            torch.tensor([min(feeding.text_rows(count), size) for count, size in zip(tokens, kept, strict=True)]).int(),
            prompts.keys,
            failures,
        )

    def batches(self, kept: list[int]) -> Iterator[tuple[int, int]]:
        """Begin and end of the batches of prompts that have so many rows, where memory suffices for the budget."""
        start = 0
        while start < len(kept):
            stop = self._fitting(kept, start)
            yield start, stop
            start = stop

    def _fitting(self, kept: list[int], start: int) -> int:
        """The end of the run of prompts from ``start`` that fits into the budget; one prompt at least."""
        stop, total = start + 1, kept[start]
        while stop < len(kept) and total + kept[stop] <= self.token_budget:
            total += kept[stop]
            stop += 1
        return stop

    def embed(self, prompts: Prompts, kept: list[int], start: int, stop: int) -> Tensor:
        """The rows that are kept of some prompts, one prompt after the other, on the CPU: [rows, d_model]."""
        feeding = self.recipe.feeding
        bounds = prompts.offsets[start : stop + 1]
        lengths = bounds.diff()
        sizes = torch.tensor(kept[start:stop])
        places = torch.arange(int(torch.maximum(lengths, sizes).max()))
        is_fed = places < lengths[:, None]
        ids = torch.full(is_fed.shape, self.recipe.pad)
        ids[is_fed] = prompts.ids[bounds[0] : bounds[-1]].long()
        fills = feeding.padding == "exact" and feeding.to_max_length
        states = encode_guarded(
            self.stack, ids, is_fed, padding="exact" if fills else "trim", extra_pad=0 if fills else feeding.extra_pad
        )
        is_kept = places[: states.shape[1]] < sizes[:, None]
        return states.cpu()[is_kept]

    def _one_by_one(self, prompts: Prompts, kept: list[int], start: int, stop: int, failures: dict[str, str]) -> Tensor:
        """As :meth:`embed`; a prompt that fails is listed and has no rows."""
        parts = [torch.empty(0, self.recipe.d_model, dtype=self.stack.dtype)]
        for place in range(start, stop):
            try:
                parts.append(self.embed(prompts, kept, place, place + 1))
            except _OF_A_PROMPT as error:
                failures[bytes(prompts.keys[place].numpy()).hex()] = str(error)
                kept[place] = 0
        return torch.cat(parts)

    def _refuse_tightened(self) -> None:
        """The set is of one encoder; one whose scales have changed gives other results than the shards before."""
        if self.stack.scales != self._scales:
            raise ValueError(
                "float16 overflowed and scales were tightened, which changes the embeddings; find the scales with "
                "nai-t5 calibrate --out FILE and plan a new set with --scales FILE, or compute in bfloat16"
            )


def _is_want_of_memory(error: Exception) -> bool:
    # On processors, torch has no error of its own for this.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _refuse_nothing_but_failures(number: int, encoded: Encoded) -> None:
    """One prompt may be at fault; if all are, it is the encoder."""
    prompts = len(encoded.keys)
    if 1 < prompts == len(encoded.failures):
        reason = next(iter(encoded.failures.values()))
        raise ValueError(
            f"all {prompts:,} prompts of shard {number} fail, the first since {reason}. Nothing was written of them; "
            "mend the encoder's files, and plan a new folder"
        )
