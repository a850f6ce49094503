"""Damage to the metadata of GGUF files: values of other kinds, in headers that are whole otherwise."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_damage import Draw, damaged_bytes
from hypothesis import strategies as st

from nai_t5_core.facts.gguf_header import read_header

Value = tuple[int, bytes]
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _INT64, _FLOAT64 = 4, 6, 7, 8, 9, 11, 12
_KINDS = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "u8": 10, "i8": 11, "f8": 12}


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def encoded(value: Any) -> Value:
    """A value as the format has it, and the number of its kind there."""
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        fits = 0 <= value < 2**32
        return (_UINT32, struct.pack("<I", value)) if fits else (_INT64, struct.pack("<q", value))
    if isinstance(value, float):
        return _FLOAT64, struct.pack("<d", value)
    if isinstance(value, str):
        return _STRING, text(value)
    if isinstance(value, list):
        return _ARRAY, struct.pack("<IQ", _STRING, len(value)) + b"".join(map(text, value))
    kind = _BOOL if value.dtype == np.bool_ else _KINDS[value.dtype.str[1:]]
    return _ARRAY, struct.pack("<IQ", kind, len(value)) + value.tobytes()


_ODD: list[Value] = [
    *map(encoded, (0, 1, 7, 10**9, -1, 2**62, 1.5, 1e300, float("nan"), float("inf"), True, "", "x", "t5", "llama")),
    *map(encoded, ([], [b"a"], [b"\xff"] * 3, [b"a"] * 300)),
    *(encoded(np.full(count, number, kind)) for kind in _KINDS for count, number in ((0, 0), (3, 1), (200, 100))),
    encoded(np.full(140, 1e300)),
    encoded(np.full(140, np.nan, np.float32)),
    (_ARRAY, struct.pack("<IQ", _ARRAY, 1) + struct.pack("<IQ", _STRING, 0)),
    (_ARRAY, struct.pack("<IQ", _FLOAT32, 2**62)),
    (77, b""),
]


@st.composite
def damaged_gguf(draw: Draw, content: bytes) -> bytes:
    """One or a few metadata changed, added or left out; or any bytes."""
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged_bytes(content))
    metadata, tensors = _parts(content)
    for _ in range(draw(st.sampled_from([1, 1, 2, 4]))):
        key = draw(st.sampled_from([*sorted(metadata), "split.count", "general.alignment", "x"]))
        if draw(st.integers(0, 4)):
            metadata[key] = draw(st.sampled_from(_ODD))
        else:
            metadata.pop(key, None)
    entries = b"".join(text(key) + struct.pack("<I", kind) + value for key, (kind, value) in metadata.items())
    return _file(len(metadata), entries, *tensors)


def _parts(content: bytes) -> tuple[dict[str, Value], tuple[int, bytes, bytes]]:
    """The metadata; the number of tensors, their descriptions, and their data."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t5.gguf"
        path.write_bytes(content)
        header = read_header(path)
    metadata = {key: encoded(value) for key, value in header.metadata.items()}
    start = min(tensor.start for tensor in header.tensors.values())
    described = b"".join(
        text(name)
        + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        + struct.pack("<IQ", tensor.kind, tensor.start - start)
        for name, tensor in header.tensors.items()
    )
    return metadata, (len(header.tensors), described, content[start:])


def _file(entry_count: int, entries: bytes, tensor_count: int, described: bytes, data: bytes) -> bytes:
    begin = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, entry_count) + entries + described
    return begin + bytes(-len(begin) % 32) + data
