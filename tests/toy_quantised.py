"""Quantised toys: names, shapes and dtypes are those that each kind's own tools write, the numbers are noise."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nai_t5_core.backends.quantised.scaled import tiled_shape

Tensors = dict[str, Tensor]
# A quantised projection [rows, columns]: from its module's name and weight to the tensors that stand for it.
Quantise = Callable[[str, Tensor], Tensors]

_FLOAT8 = torch.float8_e4m3fn


def note(**content: object) -> Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def _bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def nvfp4(name: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    return {
        f"{name}.weight": _bytes(rows, columns // 2),
        f"{name}.weight_scale": torch.ones(rows, columns // 16).to(_FLOAT8),
        f"{name}.weight_scale_2": torch.tensor(0.01),
    }


def nvfp4_of_comfyui(name: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    scale = (torch.rand(tiled_shape(rows, columns // 16)) + 0.5).to(_FLOAT8)
    return {**nvfp4(name, weight), f"{name}.weight_scale": scale, f"{name}.comfy_quant": note(format="nvfp4")}


def nvfp4_of_compressed_tensors(name: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    return {
        f"{name}.weight_packed": _bytes(rows, columns // 2),
        f"{name}.weight_scale": torch.ones(rows, columns // 16).to(_FLOAT8),
        f"{name}.weight_global_scale": torch.ones(1),
        f"{name}.input_global_scale": torch.ones(1),
    }


def mxfp8(name: str, weight: Tensor) -> Tensors:
    if not hasattr(torch, "float8_e8m0fnu"):
        pytest.skip(f"torch {torch.__version__} has no float8_e8m0fnu, the type of these scales; 2.7 has it")
    rows, columns = weight.shape
    scales = torch.full((rows, columns // 32), 120, dtype=torch.uint8)
    return {f"{name}.weight": weight.to(_FLOAT8), f"{name}.weight_scale": scales.view(torch.float8_e8m0fnu)}


def mxfp8_of_comfyui(name: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    powers = torch.randint(124, 129, tiled_shape(rows, columns // 32), dtype=torch.uint8)
    how = note(format="mxfp8")
    return {f"{name}.weight": weight.to(_FLOAT8), f"{name}.weight_scale": powers, f"{name}.comfy_quant": how}


def int8_of_comfyui(name: str, weight: Tensor) -> Tensors:
    small, scale = _int8(weight)
    how = note(format="int8_tensorwise", convrot=True, convrot_groupsize=16)
    return {f"{name}.weight": small, f"{name}.weight_scale": scale, f"{name}.comfy_quant": how}


def int8_of_comfyui_by_weight(name: str, weight: Tensor) -> Tensors:
    scale = weight.abs().max() / 127
    small = (weight / scale).round().to(torch.int8)
    how = note(format="int8_tensorwise")
    return {f"{name}.weight": small, f"{name}.weight_scale": scale, f"{name}.comfy_quant": how}


def w4a4_of_comfyui(name: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    return {
        f"{name}.weight": _bytes(rows, columns // 2).view(torch.int8),
        f"{name}.weight_scale": torch.ones(rows, columns // 16),
        f"{name}.comfy_quant": note(format="convrot_w4a4"),
    }


def int8_with_scales(name: str, weight: Tensor) -> Tensors:
    small, scale = _int8(weight)
    return {f"{name}.weight": small, f"{name}.weight_scale": scale}


def nf4(name: str, weight: Tensor, kind: str = "nf4", nested: bool = True) -> Tensors:
    told = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    blocks = weight.numel() // 64
    parts = {"weight": _bytes(weight.numel() // 2, 1), "weight.quant_map": torch.linspace(-1, 1, 16)}
    if nested:
        told |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.07}
        parts["weight.absmax"] = _bytes(blocks)
        parts["weight.nested_absmax"] = torch.rand(-(-blocks // 256)) * 0.05
        parts["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
    else:
        parts["weight.absmax"] = torch.rand(blocks) * 0.1
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = note(**told)
    return {f"{name}.{leaf}": part for leaf, part in parts.items()}


def nf4_without_nesting(name: str, weight: Tensor) -> Tensors:
    return nf4(name, weight, nested=False)


def fp4(name: str, weight: Tensor) -> Tensors:
    return nf4(name, weight, "fp4")


def llm_int8(name: str, weight: Tensor) -> Tensors:
    return {
        f"{name}.weight": _int8(weight)[0],
        f"{name}.SCB": weight.abs().amax(1).float(),
        f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def quanto_int8(name: str, weight: Tensor) -> Tensors:
    small, scale = _int8(weight)
    return {
        f"{name}.weight._data": small,
        f"{name}.weight._scale": scale.bfloat16(),
        f"{name}.input_scale": torch.tensor(1.0),
        f"{name}.output_scale": torch.tensor(1.0),
    }


def quanto_int4(name: str, weight: Tensor) -> Tensors:
    groups = weight.numel() // 32
    return {
        f"{name}.weight._data._data": _bytes(16, groups),
        f"{name}.weight._scale": torch.ones(1, groups),
        f"{name}.weight._shift": torch.ones(1, groups),
    }


def quanto_float8(name: str, weight: Tensor) -> Tensors:
    return {f"{name}.weight._data": weight.to(_FLOAT8), f"{name}.weight._scale": torch.ones(len(weight), 1)}


def hqq(name: str, weight: Tensor) -> Tensors:
    groups = weight.numel() // 64
    return {
        f"{name}.W_q": _bytes(32, groups),
        f"{name}.scale": torch.ones(1, groups),
        f"{name}.zero": torch.ones(1, groups),
        f"{name}.nbits": torch.tensor(4),
        f"{name}.group_size": torch.tensor(64),
        f"{name}.axis": torch.tensor(0),
        f"{name}.shape": torch.tensor(weight.shape),
    }


def awq(name: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    return {
        f"{name}.qweight": torch.zeros(columns, rows // 8, dtype=torch.int32),
        f"{name}.qzeros": torch.zeros(columns // 16, rows // 8, dtype=torch.int32),
        f"{name}.scales": torch.ones(columns // 16, rows, dtype=torch.float16),
    }


def awq_of_nunchaku(name: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    return {
        f"{name}.qweight": torch.zeros(rows // 4, columns // 2, dtype=torch.int32),
        f"{name}.scales": torch.ones(columns // 16, rows, dtype=torch.bfloat16),
        f"{name}.scaled_zeros": torch.ones(columns // 16, rows, dtype=torch.bfloat16),
    }


def gptq(name: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    return {
        f"{name}.qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        f"{name}.qzeros": torch.zeros(columns // 16, rows // 8, dtype=torch.int32),
        f"{name}.scales": torch.ones(columns // 16, rows, dtype=torch.float16),
        f"{name}.g_idx": torch.zeros(columns, dtype=torch.int32),
    }


def torchao(name: str, weight: Tensor) -> Tensors:
    small, scale = _int8(weight)
    return {f"{name}._weight_qdata": small, f"{name}._weight_scale": scale}


def float8_in_blocks(name: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
    return {f"{name}.weight": weight.to(_FLOAT8), f"{name}.weight_scale_inv": scale}


def float8_plain(name: str, weight: Tensor) -> Tensors:
    return {f"{name}.weight": weight.to(torch.float8_e5m2)}


def float8_by_rows(name: str, weight: Tensor) -> Tensors:
    scale = weight.abs().amax(1) / 448
    return {f"{name}.weight": (weight / scale[:, None]).to(_FLOAT8), f"{name}.weight_scale": scale}


def float8_fnuz_by_rows(name: str, weight: Tensor) -> Tensors:
    """A kind that our kernels do not read."""
    scale = weight.abs().amax(1) / 240
    return {f"{name}.weight": (weight / scale[:, None]).to(torch.float8_e4m3fnuz), f"{name}.weight_scale": scale}


def is_projection(name: str) -> bool:
    return ("SelfAttention" in name and "bias" not in name) or "DenseReluDense" in name


def quantised(state: Mapping[str, Tensor], quantise: Quantise) -> Tensors:
    """A state with all its projections quantised, and the rest in bfloat16."""
    out: Tensors = {}
    for name, tensor in state.items():
        is_one = is_projection(name)
        out |= quantise(name.removesuffix(".weight"), tensor) if is_one else {name: tensor.bfloat16()}
    return {name: tensor.contiguous() for name, tensor in out.items()}


def write_quantised(path: Path, state: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file(state, path, metadata)
    return path


# The kinds that are read, by what they are called.
READ: dict[str, tuple[str, Quantise]] = {
    "NVFP4": ("NVFP4", nvfp4_of_comfyui),
    "MXFP8": ("MXFP8", mxfp8_of_comfyui),
    "int8, rotated": ("int8, rotated in groups of 16", int8_of_comfyui),
    "int8, by weight": ("int8", int8_of_comfyui_by_weight),
    "int8": ("int8", int8_with_scales),
    "NF4": ("NF4 of bitsandbytes", nf4),
    "NF4, not nested": ("NF4 of bitsandbytes", nf4_without_nesting),
    "FP4": ("FP4 of bitsandbytes", fp4),
    "LLM.int8": ("int8 of bitsandbytes", llm_int8),
    "float8, in blocks": ("float8_e4m3fn in blocks", float8_in_blocks),
    "float8": ("float8_e5m2", float8_plain),
    "float8, by rows": ("float8_e4m3fn", float8_by_rows),
    "float8 fnuz, by rows": ("float8_e4m3fnuz", float8_fnuz_by_rows),
}
