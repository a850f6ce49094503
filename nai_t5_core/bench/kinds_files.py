"""Files of every kind of quantised weight with drawn bytes, for what depends on their layout alone: load and memory.

Names, shapes and dtypes are those that each kind's own tools write. Weights of one shape have the same bytes, so that a
file of any size is written in the time of its writing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.backends.quantised.scaled import tiled_shape
from nai_t5_core.bench.gguf_files import packed, write_gguf
from nai_t5_core.bench.peers import State, random_state
from nai_t5_core.facts.config import Shape, T5Config, encoder_tensors
from nai_t5_core.weights.formats import write_safetensors

PLAIN = "bfloat16"
# A weight [rows, columns] float32 to the tensors that stand for it, by what is behind the name of its module.
Parts = dict[str, Tensor]
Draw = Callable[[Tensor], Parts]

_FLOAT8_SCALE = 1 / 64
_TILE = 128
_ROTATED = 256
_4_BITS_BLOCK, _NESTED_BLOCK = 64, 256


def write_kind(kind: str, folder: Path, config: T5Config) -> Path:
    """Writes an encoder of drawn weights in a kind, to the disk and not only to the system's cache.

    Args:
        kind: one of :data:`FILE_KINDS`, or :data:`PLAIN`. Of GGUF's blocks, the table of embeddings is in Q8_0; of the
            others, it is in bfloat16.

    Raises:
        ValueError: the package gguf is not installed, or llama.cpp's files cannot hold this config.
        CheckpointError: the disk has too little room.
    """
    state = _State(config)
    if kind in GGUF_KINDS:
        path = write_gguf(folder / f"{kind}.gguf", config, state, kind, _drawn_blocks)
    else:
        path = folder / f"{kind}.safetensors"
        _write_safetensors(path, state, _DRAWN.get(kind, _plain))
    with path.open("rb") as written:
        os.fsync(written.fileno())
    return path


def refuse_files(kinds: Sequence[str], config: T5Config) -> None:
    """Raises a ValueError for an unknown kind, and for one whose blocks do not fill the rows of a model's weights."""
    if unknown := [kind for kind in kinds if kind not in FILE_KINDS]:
        raise ValueError(f"unknown kinds {unknown}; allowed: {', '.join(FILE_KINDS)}")
    for kind in kinds:
        block = GGML_KINDS[kind].block if kind in GGML_KINDS else _BLOCKS.get(kind, 1)
        for columns in (config.d_model, config.inner_dim, config.d_ff):
            if columns % block:
                raise ValueError(
                    f"rows of {columns} numbers are no whole blocks of {block}, as {kind} has them; leave it out of "
                    "--kinds, or take another size"
                )


class _State(dict[str, Tensor]):
    """An encoder's weights, whose layers all have those of the first."""

    def __init__(self, config: T5Config) -> None:
        config = config.encoder_only()
        first: State = random_state(config.model_copy(update={"num_layers": 1}))
        super().__init__({name: first[re.sub(r"block\.\d+", "block.0", name)] for name in encoder_tensors(config)})


def _write_safetensors(path: Path, state: State, draw: Draw) -> None:
    made: dict[int, Parts] = {}  # by the weight that layers have in common

    def parts(name: str, tensor: Tensor) -> Parts:
        is_projection = tensor.ndim == 2 and name != "shared.weight" and "relative_attention_bias" not in name
        if id(tensor) not in made:
            made[id(tensor)] = draw(tensor) if is_projection else _plain(tensor)
        module = name.removesuffix(".weight")
        return {f"{module}.{leaf}": part for leaf, part in made[id(tensor)].items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in state.items():
            yield from parts(name, tensor).items()

    layout: dict[str, tuple[torch.dtype, Shape]] = {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors()
    }
    write_safetensors(path, layout, tensors(), {"format": "pt"})


def _plain(weight: Tensor) -> Parts:
    return {"weight": weight.bfloat16()}


# ---------------------------------------------------------------------------------------------------------------------
# GGUF
# ---------------------------------------------------------------------------------------------------------------------

GGUF_KINDS = (*GGML_KINDS, "F16", "BF16")


def _drawn_blocks(weight: Tensor, kind: str) -> np.ndarray:
    return _blocks(kind, tuple(weight.shape)) if kind in GGML_KINDS else packed(weight, kind)


@lru_cache(maxsize=8)
def _blocks(kind: str, shape: Shape) -> np.ndarray:
    """Any blocks whose scales are such as weights have."""
    found = GGML_KINDS[kind]
    blocks = torch.randint(0, 256, (shape[0] * shape[1] // found.block, found.size), dtype=torch.uint8)
    for place in found.halves:
        scales = torch.empty(len(blocks), 1).uniform_(1e-5, 1e-4).half()
        blocks[:, place : place + 2] = scales.view(torch.uint8)
    return blocks.reshape(shape[0], -1).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Safetensors
# ---------------------------------------------------------------------------------------------------------------------


def _note(**content: object) -> Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def _random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _float8(weight: Tensor, dtype: torch.dtype) -> Parts:
    return {"weight": (weight / _FLOAT8_SCALE).to(dtype), "weight_scale": torch.tensor(_FLOAT8_SCALE)}


def _float8_in_blocks(weight: Tensor) -> Parts:
    rows, columns = weight.shape
    scale = torch.full((-(-rows // _TILE), -(-columns // _TILE)), _FLOAT8_SCALE)
    return {"weight": (weight / _FLOAT8_SCALE).to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def _mxfp8(weight: Tensor) -> Parts:
    powers = torch.full(tiled_shape(len(weight), weight.shape[1] // 32), 121, dtype=torch.uint8)
    return {
        "weight": (weight * 64).to(torch.float8_e4m3fn),
        "weight_scale": powers,
        "comfy_quant": _note(format="mxfp8"),
    }


def _nvfp4(weight: Tensor) -> Parts:
    rows, columns = weight.shape
    return {
        "weight": _random_bytes(rows, columns // 2),
        "weight_scale": torch.ones(tiled_shape(rows, columns // 16)).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.01),
        "comfy_quant": _note(format="nvfp4"),
    }


def _int8(weight: Tensor, rotated: bool = False) -> Parts:
    scale = weight.abs().amax(1, keepdim=True) / 127
    how = {"convrot": True, "convrot_groupsize": _ROTATED} if rotated else {}
    return {
        "weight": (weight / scale).round().to(torch.int8),
        "weight_scale": scale,
        "comfy_quant": _note(format="int8_tensorwise", **how),
    }


def _llm_int8(weight: Tensor) -> Parts:
    largest = weight.abs().amax(1)
    return {
        "weight": (weight * (127 / largest[:, None])).round().to(torch.int8),
        "SCB": largest,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _4_bits(weight: Tensor, kind: str, nested: bool = False) -> Parts:
    """As bitsandbytes saves them, with any 16 values."""
    blocks = weight.numel() // _4_BITS_BLOCK
    told: dict[str, object] = {"quant_type": kind, "blocksize": _4_BITS_BLOCK, "shape": list(weight.shape)}
    parts = {"weight": _random_bytes(weight.numel() // 2, 1), "weight.quant_map": torch.linspace(-1, 1, 16)}
    if nested:
        told |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.07}
        parts["weight.absmax"] = _random_bytes(blocks)
        parts["weight.nested_absmax"] = torch.rand(-(-blocks // _NESTED_BLOCK)) * 0.05
        parts["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
    else:
        parts["weight.absmax"] = torch.rand(blocks) * 0.1
    return {**parts, f"weight.quant_state.bitsandbytes__{kind}": _note(**told, dtype="bfloat16")}


_DRAWN: dict[str, Draw] = {
    "float8_e4m3fn": partial(_float8, dtype=torch.float8_e4m3fn),
    "float8_e5m2": partial(_float8, dtype=torch.float8_e5m2),
    "float8-blocks": _float8_in_blocks,
    "MXFP8": _mxfp8,
    "int8": _int8,
    "int8-rotated": partial(_int8, rotated=True),
    "int8-bitsandbytes": _llm_int8,
    "NVFP4": _nvfp4,
    "NF4": partial(_4_bits, kind="nf4"),
    "NF4-nested": partial(_4_bits, kind="nf4", nested=True),
    "FP4": partial(_4_bits, kind="fp4"),
}
# Columns that have something in common.
_BLOCKS = {
    "MXFP8": 32,
    "NVFP4": 16,
    "int8-rotated": _ROTATED,
    **dict.fromkeys(("NF4", "NF4-nested", "FP4"), _4_BITS_BLOCK),
}
FILE_KINDS = (*GGUF_KINDS, *_DRAWN)
