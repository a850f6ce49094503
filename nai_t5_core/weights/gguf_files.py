"""The tensors of a GGUF file, unpacked one at a time, and what its metadata tell of the model.

Block formats are the package gguf's to know; it is imported when such a file is opened.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nai_t5_core.facts.config import Shape
from nai_t5_core.facts.gguf_header import StoredTensor, read_header
from nai_t5_core.facts.nested_text import shown
from nai_t5_core.tokenizer.gguf_vocabulary import sentencepiece_model

# In the header of a file that was split: into how many.
_PARTS = "split.count"
# Kinds that are plain numbers, which torch reads as they are. All others are blocks.
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Numbers that are unpacked at a time.
_SLICE = 1 << 22
# What llama.cpp's converter calls a T5, and where it writes the values of its config.
_ARCHITECTURES = ("t5", "t5encoder")
_CONFIG_KEYS = {
    "block_count": "num_layers",
    "decoder_block_count": "num_decoder_layers",
    "embedding_length": "d_model",
    "feed_forward_length": "d_ff",
    "attention.head_count": "num_heads",
    "attention.key_length": "d_kv",
    "attention.relative_buckets_count": "relative_attention_num_buckets",
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "decoder_start_token_id": "decoder_start_token_id",
}
_TOKENS = "tokenizer.ggml"
_TOKEN_KEYS = {"padding_token_id": "pad_token_id", "eos_token_id": "eos_token_id"}
_DAMAGED = "is a damaged GGUF file ({}); fetch it again"


@dataclass(frozen=True)
class GgufFile:
    """An opened GGUF file.

    Attributes:
        tensors: by the names in the file.
        vocabulary: the SentencePiece model in the metadata.
        config: what the metadata tell of the model, by the fields of :class:`nai_t5_core.facts.config.T5Config`.
    """

    tensors: dict[str, GgufTensor]
    vocabulary: bytes | None
    config: dict[str, float]

    @property
    def kinds(self) -> str:
        """How many tensors are kept in which way, such as ``tensors in Q8_0: 168, F32: 50``."""
        counts = Counter(tensor.kind.name for tensor in self.tensors.values()).most_common()
        return f"tensors in {', '.join(f'{name}: {count}' for name, count in counts)}" if counts else "no tensors"


@dataclass(frozen=True)
class Kind:
    """How tensors are kept: ``block`` numbers in ``size`` bytes. ``obstacle`` says why they cannot be unpacked."""

    name: str
    block: int
    size: int
    unpack: Callable[[np.ndarray], np.ndarray] | None = None
    obstacle: str = ""

    @property
    def is_plain(self) -> bool:
        return self.name in _PLAIN

    @property
    def packing(self) -> str:
        """The name of the blocks; empty for plain numbers."""
        return "" if self.is_plain else self.name


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a file, from the byte ``start`` on."""

    path: Path
    shape: Shape
    kind: Kind
    start: int

    @property
    def dtype(self) -> torch.dtype:
        """What it is read as: blocks are numbers times scales, which float32 holds."""
        return _PLAIN.get(self.kind.name, torch.float32)

    def read(self) -> Tensor:
        """The tensor: a plain matrix mapped; blocks unpacked in slices, so that memory holds little beside it."""
        if self.kind.is_plain and len(self.shape) == 2 and self.nbytes:
            return self.mapped().view(self.dtype)
        if self.kind.is_plain:
            content = self._bytes(0, self.nbytes)
            return torch.from_numpy(content).view(self.dtype).reshape(self.shape)
        assert self.kind.unpack is not None, self.kind.obstacle
        width = self.shape[-1]
        rows = torch.empty(math.prod(self.shape[:-1]), width)
        row_bytes = width // self.kind.block * self.kind.size
        step = max(1, _SLICE // max(1, width))
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            packed = self._bytes(first * row_bytes, len(part) * row_bytes).reshape(len(part), row_bytes)
            part.copy_(torch.from_numpy(self.kind.unpack(packed)))
        return rows.reshape(self.shape)

    def mapped(self) -> Tensor:
        """The bytes [rows, bytes of a row], mapped: they are read when they are used.

        Raises:
            ValueError: the file has become shorter since it was opened.
        """
        rows = math.prod(self.shape[:-1])
        self._refuse_shorter(self.nbytes)
        # Copied on writing, which nobody does: torch has no tensors that cannot be written.
        content = np.memmap(self.path, np.uint8, "c", self.start, (rows, self.nbytes // max(1, rows)))
        return torch.from_numpy(content)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.block * self.kind.size

    def _bytes(self, begin: int, count: int) -> np.ndarray:
        self._refuse_shorter(begin + count)
        return np.fromfile(self.path, np.uint8, count, offset=self.start + begin)

    def _refuse_shorter(self, count: int) -> None:
        if self.path.stat().st_size < self.start + count:
            raise ValueError(f"{self.path} has become shorter since it was opened; fetch it again")


def open_gguf(path: Path) -> GgufFile:
    """Reads the header of a GGUF file, and no tensor.

    Raises:
        ValueError: the package gguf is not installed, or the file is damaged or one part of several; the message goes
            on from the file's name.
    """
    _require_gguf()
    header = read_header(path)
    parts = header.metadata.get(_PARTS, 1)
    if not isinstance(parts, (int, float, str)):
        raise ValueError(_DAMAGED.format(f"{_PARTS} is {shown(parts)}, and a number is needed"))
    if parts != 1:
        raise ValueError(
            f"is one of {parts} parts of a GGUF file; join them with 'llama-gguf-split --merge', or use a whole file "
            "of the same model"
        )
    tensors = {name: _placed(path, name, stored) for name, stored in header.tensors.items()}
    return GgufFile(tensors, sentencepiece_model(header.metadata), _config_values(header.metadata))


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401 - to refuse before anything is read
    except ImportError as error:
        raise ValueError(
            "is a GGUF file, and reading it needs the package gguf: install it with 'python -m pip install gguf' (the "
            "extra of comfy-nai-t5[gguf]), or use a safetensors file of the same model"
        ) from error


def _placed(path: Path, name: str, stored: StoredTensor) -> GgufTensor:
    """Raises a ValueError if the file ends before the tensor does, or its rows are no whole blocks."""
    tensor = GgufTensor(path, stored.shape, _kind(stored.kind), stored.start)
    width = stored.shape[-1] if stored.shape else 1
    if width % tensor.kind.block:
        fault = f"{name} has rows of {width:,} numbers, which are no whole blocks of {tensor.kind.name}"
    elif (missing := stored.start + tensor.nbytes - path.stat().st_size) > 0:
        fault = f"{missing:,} bytes of {name} are missing"
    else:
        return tensor
    raise ValueError(_DAMAGED.format(fault))


@cache
def _kind(number: int) -> Kind:
    """The kind of tensors that has this number in the format."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        kind = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        return Kind(f"kind {number}", 1, 0, obstacle="which the installed package gguf does not know yet")

    def unpack(packed: np.ndarray) -> np.ndarray:
        values: np.ndarray = dequantize(packed, kind)
        return values

    if kind.name not in _PLAIN:
        try:
            unpack(np.zeros((1, size), np.uint8))
        except NotImplementedError:
            return Kind(kind.name, block, size, obstacle="which the installed package gguf cannot unpack")
    return Kind(kind.name, block, size, unpack)


def _config_values(metadata: Mapping[str, Any]) -> dict[str, float]:
    """What the metadata tell of a T5's config.

    Raises:
        ValueError: something else than a number stands where one belongs.
    """
    architecture = metadata.get("general.architecture")
    keys = {f"{_TOKENS}.{key}": field for key, field in _TOKEN_KEYS.items()}
    if isinstance(architecture, str) and architecture in _ARCHITECTURES:
        keys |= {f"{architecture}.{key}": field for key, field in _CONFIG_KEYS.items()}
    told = {key: metadata[key] for key in keys if key in metadata}
    odd = next((key for key, value in told.items() if type(value) not in (int, float)), None)
    if odd is not None:
        raise ValueError(_DAMAGED.format(f"{odd} is {shown(told[odd])}, and a number is needed"))
    return {keys[key]: _shortest(value) for key, value in told.items()}


def _shortest(value: float) -> float:
    """A number as it was before it was stored in float32: 1e-6 and not 9.99999997e-07."""
    return value if isinstance(value, int) else float(str(np.float32(value)))
