"""T5 encoders in GGUF files, by their Hugging Face names; blocks are unpacked to float16 as they are read.

Reading needs the package gguf, which knows every block format; it is imported when such a file is opened.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.formats import Checkpoint, CheckpointError, TensorInfo

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
    """Opens a GGUF file with a T5 encoder; what else is in it is left out.

    Raises:
        CheckpointError: the package gguf is not installed, or the file is damaged.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a GGUF file, and reading it needs the package gguf: install it with 'python -m "
            "pip install gguf' into ComfyUI's Python and restart, or use a safetensors file of the same model"
        ) from error
    try:
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{path} is a damaged GGUF file ({error}); fetch it again") from error
    tensors = {_hf_name(name, "enc.blk.0.ffn_gate.weight" in stored): tensor for name, tensor in stored.items()}
    unpacked = {name: tensor for name, tensor in tensors.items() if name}

    def read(name: str) -> Tensor:
        return _unpack(unpacked[name], name, path)

    infos = {
        name: TensorInfo(tuple(int(size) for size in reversed(tensor.shape)), _dtype(tensor), Path(path))
        for name, tensor in unpacked.items()
    }
    return Checkpoint(str(path), "GGUF", infos, read)


def _hf_name(name: str, is_gated: bool) -> str:
    """The Hugging Face name of an encoder's tensor; "" for any other."""
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _IN_BLOCK:
        return _WHOLE.get(name, "")
    place = _IN_BLOCK[match[2]] if is_gated or match[2] != "ffn_up" else "layer.1.DenseReluDense.wi"
    return f"encoder.block.{match[1]}.{place}.weight"


def _dtype(tensor: Any) -> torch.dtype:
    return {"F32": torch.float32, "BF16": torch.bfloat16}.get(tensor.tensor_type.name, torch.float16)


def _unpack(tensor: Any, name: str, path: str | Path) -> Tensor:
    from gguf.quants import dequantize

    values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    values = values.reshape([int(size) for size in reversed(tensor.shape)]).to(_dtype(tensor))
    if not values.isfinite().all():
        raise CheckpointError(f"{path} holds {name} beyond float16's range; use a safetensors file of the same model")
    return values
