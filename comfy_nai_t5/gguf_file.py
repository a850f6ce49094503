"""T5 encoders in GGUF files, by their Hugging Face names; blocks are unpacked to float16 as they are read.

Unpacking needs the package gguf, which knows every block format; it is imported when such a file is opened.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comfy_nai_t5.gguf_format import StoredTensor, read_header
from comfy_nai_t5.gguf_tokenizer import sentencepiece_model
from nai_t5_core.weights.formats import Checkpoint, CheckpointError, TensorInfo

# What ComfyUI's single files call the SentencePiece model in them.
TOKENIZER = "spiece_model"
# In the header of a file that was split: into how many.
_PARTS = "split.count"
_BLOCK = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")
_WHOLE = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
_IN_BLOCK = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}


def is_gguf(path: str | Path | None) -> bool:
    """Whether there is a GGUF file at the path, by its first bytes."""
    if path is None or not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(4) == b"GGUF"


def open_gguf(path: str | Path) -> Checkpoint:
    """Opens a GGUF file with a T5 encoder, and the tokenizer where there is one; what else is in it is left out.

    Raises:
        CheckpointError: the package gguf is not installed, or the file is damaged.
    """
    try:
        import gguf  # noqa: F401 - to refuse before anything is read
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a GGUF file, and reading it needs the package gguf: install it with 'python -m "
            "pip install gguf' into ComfyUI's Python and restart, or use a safetensors file of the same model"
        ) from error
    try:
        header = read_header(path)
        tokenizer = sentencepiece_model(header.metadata)
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is a damaged GGUF file ({error}); fetch it again") from error
    parts = int(header.metadata.get(_PARTS, 1))
    if parts > 1:
        raise CheckpointError(
            f"{path} is one of {parts} parts of a GGUF file; join them with 'llama-gguf-split --merge', or use a whole "
            "file of the same model"
        )
    is_gated = "enc.blk.0.ffn_gate.weight" in header.tensors
    named = {_hf_name(name, is_gated): tensor for name, tensor in header.tensors.items()}
    blocks = {name: _Blocks.of(tensor, name, Path(path)) for name, tensor in named.items() if name}

    def read(name: str) -> Tensor:
        if name == TOKENIZER and tokenizer is not None:
            return torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
        return blocks[name].unpack()

    infos = {name: TensorInfo(tensor.shape, tensor.dtype, Path(path)) for name, tensor in blocks.items()}
    if tokenizer is not None:
        infos[TOKENIZER] = TensorInfo((len(tokenizer),), torch.uint8, Path(path))
    return Checkpoint(str(path), "GGUF", infos, read)


@dataclass(frozen=True)
class _Blocks:
    """A tensor in a file: ``kind`` is that of the package gguf, ``packed`` the shape with rows in bytes."""

    name: str
    path: Path
    shape: tuple[int, ...]
    kind: Any
    packed: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, stored: StoredTensor, name: str, path: Path) -> _Blocks:
        """Raises a CheckpointError if the file ends before the tensor does, or its kind is unknown."""
        from gguf import GGMLQuantizationType
        from gguf.quants import quant_shape_to_byte_shape

        try:
            kind = GGMLQuantizationType(stored.kind)
            packed = quant_shape_to_byte_shape(stored.shape, kind)
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path} keeps {name} in blocks of a kind that the installed package gguf does not know ({error}); "
                "update it, or use a safetensors file of the same model"
            ) from error
        missing = stored.start + math.prod(packed) - path.stat().st_size
        if missing > 0:
            raise CheckpointError(
                f"{path} is a damaged GGUF file ({missing:,} bytes of {name} are missing); fetch it again"
            )
        return cls(name, path, stored.shape, kind, packed, stored.start)

    @property
    def dtype(self) -> torch.dtype:
        return {"F32": torch.float32, "BF16": torch.bfloat16}.get(self.kind.name, torch.float16)

    def unpack(self) -> Tensor:
        from gguf.quants import dequantize

        data = np.fromfile(self.path, np.uint8, math.prod(self.packed), offset=self.start).reshape(self.packed)
        try:
            exact = torch.from_numpy(dequantize(data, self.kind))
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path} keeps {self.name} as {self.kind.name}, which the package gguf cannot unpack; use another "
                "file of the same model"
            ) from error
        values = exact.to(self.dtype)
        # Rows of the embedding that no prompt uses may be anything in the original.
        may_be_odd = ~exact.isfinite() if self.name == "shared.weight" else torch.tensor(False)
        if not (values.isfinite() | may_be_odd).all():
            raise CheckpointError(
                f"{self.path} holds {self.name} beyond float16's range; use a safetensors file of the same model"
            )
        return values


def _hf_name(name: str, is_gated: bool) -> str:
    """The Hugging Face name of an encoder's tensor; "" for any other."""
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _IN_BLOCK:
        return _WHOLE.get(name, "")
    place = _IN_BLOCK[match[2]] if is_gated or match[2] != "ffn_up" else "layer.1.DenseReluDense.wi"
    return f"encoder.block.{match[1]}.{place}.weight"
