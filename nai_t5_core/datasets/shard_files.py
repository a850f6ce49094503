"""``shards/NNNNN.safetensors``: the embeddings of a shard.

A shard is there only if it is complete. Its tensors are ``rows``, ``offsets``, ``tokens`` and ``keys``; those in 8 bits
have ``scales`` and ``channels`` as well, and compressed ones ``blocks``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nai_t5_core.datasets.arrow import MissingPackageError
from nai_t5_core.datasets.coding import Coder, coder
from nai_t5_core.datasets.folder import sync_folder
from nai_t5_core.datasets.recipe import Keeping
from nai_t5_core.datasets.storing import StoredRows, pack_rows, reduce_rows, stored_dtype, unpack_rows
from nai_t5_core.facts.nested_text import parse_object
from nai_t5_core.weights.formats import tensor_bytes, write_safetensors
from nai_t5_core.weights.safetensors_files import DTYPE_NAMES

FORMAT = "nai-t5 caption shard 1"
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# Larger headers are damage.
_LONGEST_HEADER = 100_000_000


class DamagedShardError(ValueError):
    """A shard's file is not what was written; the message names it."""


@dataclass(frozen=True)
class Encoded:
    """What a worker has computed of a shard.

    Attributes:
        rows: [rows, d_model] in the compute dtype, of one prompt after the other.
        offsets: int64 [prompts + 1], where each prompt's rows begin.
        tokens: int32 [prompts], rows of each that a mask counts as text.
        keys: uint8 [prompts, 32].
        failures: by hexadecimal key, why a prompt has no rows.
    """

    rows: Tensor
    offsets: Tensor
    tokens: Tensor
    keys: Tensor
    failures: Mapping[str, str]


def write_shard(file: Path, encoded: Encoded, keeping: Keeping) -> int:
    """Writes a shard; gives the bytes of its file.

    Raises:
        OSError: it cannot be written. Nothing is left behind.
        CheckpointError: the disk has too little room.
    """
    stored = reduce_rows(encoded.rows, keeping.store)
    tensors = {"rows": stored.rows, "offsets": encoded.offsets, "tokens": encoded.tokens, "keys": encoded.keys}
    if stored.scales is not None and stored.channels is not None:
        tensors |= {"scales": stored.scales, "channels": stored.channels}
    if keeping.compress != "none":
        tensors |= _compressed(stored.rows, encoded.offsets, coder(keeping.compress))
    # The largest numbers first, so that each begins where its size divides the place.
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    metadata = {
        "format": FORMAT,
        "store": keeping.store,
        "compress": keeping.compress,
        "d_model": str(stored.rows.shape[1]),
        "sha256": _contents(tensor_bytes(tensor) for tensor in tensors.values()),
        "failures": json.dumps(dict(encoded.failures), sort_keys=True),
    }
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(file, layout, tensors.items(), metadata)
    sync_folder(file.parent)
    return file.stat().st_size


def _compressed(rows: Tensor, offsets: Tensor, by: Coder) -> dict[str, Tensor]:
    """Every prompt as a block of its own, so that each can be read without the others."""
    bounds = offsets.tolist()
    packed = [pack_rows(rows[start:stop], by) for start, stop in pairwise(bounds)]
    blocks = torch.tensor([0, *(len(block) for block in packed)]).cumsum(0)
    joined = np.frombuffer(b"".join(packed), np.uint8).copy()
    return {"rows": torch.from_numpy(joined), "blocks": blocks}


def _contents(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


class ShardFile:
    """An opened shard, mapped into memory.

    Raises:
        DamagedShardError: the file is not there, cut off, or no shard.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            header, self._begin = _header(file)
            metadata = header.pop("__metadata__")
            if metadata["format"] != FORMAT:
                raise ValueError(f"its format is {metadata['format']!r}")
            self._places = {name: _Place.of(entry) for name, entry in header.items()}
            self.d_model = int(metadata["d_model"])
            size = self._begin + max(place.end for place in self._places.values())
            if file.stat().st_size != size:
                raise ValueError(f"it has {file.stat().st_size:,} bytes in place of {size:,}")
            self.store, self.compress = metadata["store"], metadata["compress"]
            self.sha256: str = metadata["sha256"]
            self.failures: dict[str, str] = parse_object(metadata["failures"])
            self._bytes = np.memmap(file, np.uint8, "c", self._begin)
            self.offsets = self._tensor("offsets").clone()
            self.tokens = self._tensor("tokens").clone()
            self.keys = self._tensor("keys").clone()
            self._coder = None if self.compress == "none" else coder(self.compress)
            self._blocks = None if self._coder is None else self._tensor("blocks").clone()
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise DamagedShardError(f"{file} is damaged or missing: {error}") from error

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, prompt: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The embedding of a prompt, [rows, d_model]; memory of its own.

        Raises:
            ValueError: the prompt failed.
            DamagedShardError: its bytes are damaged.
            MissingPackageError: they are compressed by Zstandard, and pyarrow is not installed or has none.
        """
        start, stop = int(self.offsets[prompt]), int(self.offsets[prompt + 1])
        key = bytes(self.keys[prompt].numpy()).hex()
        if key in self.failures:
            raise ValueError(f"the prompt has no embedding, since it failed: {self.failures[key]}")
        plain = self._blocks is None
        rows = self._tensor("rows", start, stop) if plain else self._unpacked(prompt, stop - start)
        if self.store == "bfloat16":
            return StoredRows(rows).read(dtype)
        return StoredRows(rows, self._tensor("scales", start, stop), self._tensor("channels")).read(dtype)

    def contents(self) -> str:
        """The hash of all that follows the header, read anew."""
        return _contents([self._bytes])

    def _unpacked(self, prompt: int, rows: int) -> Tensor:
        assert self._blocks is not None and self._coder is not None
        begin, end = int(self._blocks[prompt]), int(self._blocks[prompt + 1])
        place = self._places["rows"].begin
        packed = self._bytes[place + begin : place + end].data
        try:
            return unpack_rows(packed, (rows, self.d_model), stored_dtype(self.store), self._coder)
        except MissingPackageError:
            raise
        except ValueError as error:
            raise DamagedShardError(
                f"{self.file} is damaged: {error}. nai-t5 precompute verify sets it aside, and the next run makes it "
                "again"
            ) from error

    def _tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or a run of its rows, as a view of the file that must not be written to."""
        place = self._places[name]
        width = place.dtype.itemsize * int(np.prod(place.shape[1:], dtype=np.int64))
        stop = place.shape[0] if stop is None else stop
        part = self._bytes[place.begin + start * width : place.begin + stop * width]
        if not len(part):
            return torch.empty(stop - start, *place.shape[1:], dtype=place.dtype)
        return torch.from_numpy(np.asarray(part)).view(place.dtype).view(stop - start, *place.shape[1:])


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> _Place:
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if end - begin != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
            raise ValueError("a tensor's size is not that of its shape")
        return cls(dtype, shape, begin, end)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its tensors begin."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError("its header is no safetensors header")
        return parse_object(opened.read(length)), 8 + length
