"""Weights into every kind that is measured, by our own packing, by the package gguf, or by llama.cpp.

What ComfyUI and bitsandbytes do on a GPU is done here by torch: values are rounded to the nearest, and each scale is
that of its block's largest value.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nai_t5_core.backends.quantised.four_bits import LARGEST, NESTED_LARGEST, NESTED_TABLE, TABLE, FourBits
from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.backends.quantised.kinds import WEIGHT, QuantisedWeight
from nai_t5_core.backends.quantised.packing import pack
from nai_t5_core.backends.quantised.scaled import (
    E2M1,
    MXFP8,
    NVFP4,
    SCALE,
    SCALE_2,
    Scaled,
    tiled_shape,
    turned_back,
    untiled,
)
from nai_t5_core.bench.gguf_files import EXTRA
from nai_t5_core.bench.peers import require

# A weight [rows, columns] float32 into a kind.
Packing = Callable[[Tensor], QuantisedWeight]

_E2M1_POSITIVE = tuple(E2M1[:8].tolist())
# The values of bitsandbytes: quantiles of the normal distribution, and floats, by their codes.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_POSITIVE = (0.0, 0.0052083333, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25)
_FP4 = (*_FP4_POSITIVE, *(-value for value in _FP4_POSITIVE))
_E4M3 = torch.float8_e4m3fn
_TILE, _ROTATED, _NESTED = 128, 256, 256
_TINY = torch.finfo(torch.float32).tiny


def possible_kinds() -> list[str]:
    """The kinds whose packages are installed."""
    return [kind for kind in PACKINGS if all(find_spec(name) is not None for name in _packages(kind))]


def refuse_impossible(kinds: Iterable[str]) -> None:
    """Raises a ValueError for a kind whose packages are not installed."""
    for name in dict.fromkeys(name for kind in kinds for name in _packages(kind)):
        require(name, extra=EXTRA)


def _packages(kind: str) -> tuple[str, ...]:
    if kind in BY_LLAMA_CPP:
        return "gguf", "llama_cpp"
    return ("gguf",) if getattr(PACKINGS[kind], "func", None) is _by_gguf else ()


def _of_gguf(kind: str, content: Tensor, shape: torch.Size) -> QuantisedWeight:
    return QuantisedWeight(GGML_KINDS[kind], (shape[0], shape[1]), {WEIGHT: content.reshape(shape[0], -1)})


def _by_gguf(weight: Tensor, kind: str) -> QuantisedWeight:
    gguf = require("gguf", extra=EXTRA)
    packed = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    return _of_gguf(kind, torch.from_numpy(packed.copy()), weight.shape)


def _by_llama_cpp(weight: Tensor, kind: str) -> QuantisedWeight:
    """The package gguf can only unpack these."""
    gguf, (rows, columns) = require("gguf", extra=EXTRA), weight.shape
    found = GGML_KINDS[kind]
    content = np.empty(rows * columns // found.block * found.size, np.uint8)
    number = gguf.GGMLQuantizationType[kind].value
    source = weight.contiguous()
    pointers = (ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(content.ctypes.data))
    counts = (ctypes.c_int64(each) for each in (0, rows, columns))
    written = _ggml().ggml_quantize_chunk(ctypes.c_int(number), *pointers, *counts, None)
    assert written == len(content), f"ggml wrote {written} bytes of {kind}, and {len(content)} were expected"
    return _of_gguf(kind, torch.from_numpy(content), weight.shape)


@cache
def _ggml() -> Any:
    library = require("llama_cpp", extra=EXTRA)
    folder = Path(library.__file__).parent / "lib"
    ggml = ctypes.CDLL(str(next(iter(sorted(folder.glob("*ggml-base*"))))))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    return ggml


def _codes(values: Tensor, table: tuple[float, ...]) -> Tensor:
    """The places of the nearest values of a table, uint8."""
    levels, places = torch.tensor(table).sort()
    return places[torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)].to(torch.uint8)


def _pairs(codes: Tensor) -> Tensor:
    """Two of a row in a byte, the first in its upper half."""
    return codes[:, ::2] << 4 | codes[:, 1::2]


def _largest(weight: Tensor, block: int) -> Tensor:
    """Of every ``block`` columns: [rows, blocks], more than zero."""
    return weight.reshape(len(weight), -1, block).abs().amax(dim=2).clamp(min=_TINY)


def _four_bits(weight: Tensor, name: str, table: tuple[float, ...]) -> QuantisedWeight:
    largest = _largest(weight, 64)
    codes = _codes(weight / largest.repeat_interleave(64, dim=1), table)
    parts = {WEIGHT: _pairs(codes), LARGEST: largest, TABLE: torch.tensor(table)}
    return QuantisedWeight(FourBits(f"{name} of bitsandbytes", 64), (weight.shape[0], weight.shape[1]), parts)


def _four_bits_nested(weight: Tensor, name: str, table: tuple[float, ...]) -> QuantisedWeight:
    """With scales in bytes: 256 equal steps, where bitsandbytes has finer ones around 0."""
    packed = _four_bits(weight, name, table)
    largest, steps = packed.parts[LARGEST], torch.linspace(-1, 1, 256)
    offset = float(largest.mean())
    rest = (largest - offset).reshape(-1)
    outer = torch.stack([part.abs().max() for part in rest.split(_NESTED)])
    bytes_of_scales = _codes(rest / outer.repeat_interleave(_NESTED)[: len(rest)], tuple(steps.tolist()))
    parts = {LARGEST: bytes_of_scales.reshape(largest.shape), NESTED_LARGEST: outer, NESTED_TABLE: steps}
    return QuantisedWeight(FourBits(packed.kind.name, 64, _NESTED, offset), packed.shape, packed.parts | parts)


def _e5m2(weight: Tensor) -> QuantisedWeight:
    dtype = torch.float8_e5m2
    scale = weight.abs().max() / torch.finfo(dtype).max
    parts = {WEIGHT: (weight / scale).to(dtype), SCALE: scale}
    return QuantisedWeight(Scaled("float8_e5m2", dtype), (weight.shape[0], weight.shape[1]), parts)


def _float8_in_blocks(weight: Tensor) -> QuantisedWeight:
    rows, columns = weight.shape
    whole = torch.zeros(-(-rows // _TILE) * _TILE, -(-columns // _TILE) * _TILE)
    whole[:rows, :columns] = weight
    largest = _largest(whole, _TILE).reshape(-1, _TILE, whole.shape[1] // _TILE).amax(dim=1)
    scale = largest / torch.finfo(_E4M3).max
    each = scale.repeat_interleave(_TILE, dim=0).repeat_interleave(_TILE, dim=1)[:rows, :columns]
    kind = Scaled("float8_e4m3fn in blocks", _E4M3, (_TILE, _TILE))
    return QuantisedWeight(kind, (rows, columns), {WEIGHT: (weight / each).to(_E4M3), SCALE: scale})


def _int8_rotated(weight: Tensor) -> QuantisedWeight:
    parts = pack(turned_back(weight, _ROTATED), "int8").parts  # the rotation is its own inverse
    kind = Scaled(f"int8, rotated in groups of {_ROTATED}", torch.int8, turned=_ROTATED)
    return QuantisedWeight(kind, (weight.shape[0], weight.shape[1]), parts)


def _mxfp8(weight: Tensor) -> QuantisedWeight:
    kind, (rows, columns) = MXFP8(), weight.shape
    # The largest power of two that float8 has, 256, stands for that of the block's largest value.
    exponents = _largest(weight, kind.block).log2().floor().clamp(min=-119) - 8
    most = torch.finfo(_E4M3).max
    values = (weight / exponents.exp2().repeat_interleave(kind.block, dim=1)).clamp(-most, most).to(_E4M3)
    powers = _tiled((exponents + 127).to(torch.uint8))
    return QuantisedWeight(kind, (rows, columns), {WEIGHT: values, SCALE: powers})


def _nvfp4(weight: Tensor) -> QuantisedWeight:
    kind, (rows, columns) = NVFP4(), weight.shape
    largest = _largest(weight, kind.block)
    second = largest.max() / (_E2M1_POSITIVE[-1] * torch.finfo(_E4M3).max)
    scale = (largest / (_E2M1_POSITIVE[-1] * second)).to(_E4M3)
    values = weight / (scale.float() * second).clamp(min=_TINY).repeat_interleave(kind.block, dim=1)
    codes = _codes(values.abs(), _E2M1_POSITIVE) | (values < 0).to(torch.uint8) << 3
    parts = {WEIGHT: _pairs(codes), SCALE: _tiled(scale.view(torch.uint8)).view(_E4M3), SCALE_2: second}
    return QuantisedWeight(kind, (rows, columns), parts)


def _tiled(scales: Tensor) -> Tensor:
    """Scales [rows, blocks] uint8 in the order of :func:`nai_t5_core.backends.quantised.scaled.untiled`."""
    rows, blocks = scales.shape
    tiled = torch.zeros(tiled_shape(rows, blocks), dtype=torch.uint8)
    places = untiled(torch.arange(tiled.numel()), slice(0, rows), blocks)
    tiled.view(-1)[places] = scales
    return tiled


PACKINGS: dict[str, Packing] = {
    "int8": partial(pack, kind="int8"),
    "int8-rotated": _int8_rotated,
    "Q8_0": partial(pack, kind="q8_0"),
    "Q6_K": partial(_by_llama_cpp, kind="Q6_K"),
    "Q5_K": partial(_by_llama_cpp, kind="Q5_K"),
    "Q5_1": partial(_by_gguf, kind="Q5_1"),
    "Q5_0": partial(_by_gguf, kind="Q5_0"),
    "Q4_K": partial(pack, kind="q4_k"),
    "Q4_1": partial(_by_gguf, kind="Q4_1"),
    "Q4_0": partial(_by_gguf, kind="Q4_0"),
    "IQ4_NL": partial(_by_llama_cpp, kind="IQ4_NL"),
    "IQ4_XS": partial(_by_llama_cpp, kind="IQ4_XS"),
    "NF4": partial(_four_bits, name="NF4", table=_NF4),
    "NF4-nested": partial(_four_bits_nested, name="NF4", table=_NF4),
    "FP4": partial(_four_bits, name="FP4", table=_FP4),
    "NVFP4": _nvfp4,
    "Q3_K": partial(_by_llama_cpp, kind="Q3_K"),
    "Q2_K": partial(_by_llama_cpp, kind="Q2_K"),
    "MXFP8": _mxfp8,
    "float8_e4m3fn": partial(pack, kind="float8"),
    "float8-blocks": _float8_in_blocks,
    "float8_e5m2": _e5m2,
}
# Kinds that need the package llama-cpp-python.
BY_LLAMA_CPP = [kind for kind, packing in PACKINGS.items() if getattr(packing, "func", None) is _by_llama_cpp]
