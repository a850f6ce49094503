"""What stands in the header of a safetensors file, and the formats' names for dtypes."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nai_t5_core.facts.config import Shape

# Types of 4 and 6 bits are not among these: no tensor has one number of them in each place.
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
# Older versions of torch lack some.
_DTYPES = {kind: getattr(torch, name) for kind, name in _TORCH_NAMES.items() if hasattr(torch, name)}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class SafetensorsHeader:
    """Shape, dtype and first byte of every tensor by name, the strings beside them, and tensors of types that torch
    lacks."""

    tensors: dict[str, tuple[Shape, torch.dtype, int]]
    others: dict[str, str]
    metadata: dict[str, str]


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """The header of a safetensors file; no tensor is read.

    Raises:
        ValueError: the file is damaged, or newer than the package safetensors; the message goes on from the file's
            name.
    """
    tensors, others = {}, {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata, starts = file.metadata() or {}, _starts(path)
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                piece = file.get_slice(name)
                kind = piece.get_dtype()
                if kind in _DTYPES:
                    tensors[name] = (tuple(piece.get_shape()), _DTYPES[kind], starts[name])
                else:
                    others[name] = f"a tensor of type {kind}, which cannot be read"
    except SafetensorError as error:
        raise ValueError(_fault(path, error)) from error
    return SafetensorsHeader(tensors, others, metadata)


def _starts(path: Path) -> dict[str, int]:
    """Where tensors begin, of a file that safetensors has found to be sound; it does not tell."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: 8 + length + told["data_offsets"][0] for name, told in header.items() if name != "__metadata__"}


def _fault(path: Path, error: SafetensorError) -> str:
    unknown = re.search(r"unknown variant `(\w+)`", str(error))
    if unknown:
        return (
            f"holds tensors of type {unknown[1]}, which the installed package safetensors does not know; update it, or "
            "use another file of the same model"
        )
    return f"is a damaged safetensors file ({path.stat().st_size:,} bytes: {error}); fetch it again"
