"""Damage to small whole files, as strategies: what hardware, tools and people with bad intentions do to them."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

Draw = Callable[[st.SearchStrategy[Any]], Any]
Damage = st.SearchStrategy[bytes]

_HUGE = (2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**9, 999_999_999)
_TEXTS = ("", "x", "a" * 5000, "\x00", "\ud800", "~nobody/x", "../x", "1e999", "NaN", "(a+)+$", "(", "9" * 40)
# What stands for nesting until a text is made of a value, since json itself cannot write so many levels.
_DEEP, _DEEPER = "@deep@", "@deeper@"
_ODD_VALUES = st.sampled_from(
    [
        *(None, True, False, 0, -1, 7, 1.5, -0.0, 1e308, float("nan"), float("inf"), 10**30, *_HUGE, *_TEXTS),
        *([], {}, [[]], [None], {"a": 1}, {"": None}, [1, "a"], [[1, 2]], [0] * 500, _DEEP, _DEEPER),
    ]
)
# Bytes in a text: the character map of a tokenizer.json.
_BASE64 = re.compile(r"[A-Za-z0-9+/]{200,}={0,2}")
# Mostly one, so that what is behind the first check is reached as well.
_EDITS = st.sampled_from([1, 1, 1, 2, 4])
_TEXT = st.sampled_from(_TEXTS)
# Numbers, names and quoted texts of a file that people write.
_VALUE = re.compile(rb'"[^"\n]*"|[-+]?\d[\d.eE+-]*')
_TOKEN = re.compile(rb'"[^"\n]*"|[-+]?\d[\d.eE+-]*|[A-Za-z_][\w-]*|[\[\]{}=:,]')


@st.composite
def damaged_bytes(draw: Draw, content: bytes) -> bytes:
    """A few places flipped, overwritten, cut, filled, doubled or left out."""
    for _ in range(draw(_EDITS)):
        content = _edited(draw, content)
    return content


def _edited(draw: Draw, content: bytes) -> bytes:
    place = draw(st.integers(0, len(content)))
    length = draw(st.sampled_from([1, 1, 2, 4, 8, 8, 30, 300]))
    before, gone, after = content[:place], content[place : place + length], content[place + length :]
    kind = draw(st.sampled_from(["flip", "number", "cut", "insert", "double", "leave out", "zeros", "value"]))
    if kind == "flip":
        return before + bytes(byte ^ draw(st.integers(1, 255)) for byte in gone[:8]) + gone[8:] + after
    if kind == "number":
        width = draw(st.sampled_from([1, 2, 4, 8]))
        value = draw(st.sampled_from([0, 1, *_HUGE])) % 256**width
        return before + value.to_bytes(width, "little") + content[place + width :]
    if kind == "cut":
        return before
    if kind == "insert":
        return before + draw(st.binary(min_size=1, max_size=16)) + gone + after
    if kind == "double":
        return before + gone + gone + after
    if kind == "leave out":
        return before + after
    return before + (b"\0" if kind == "zeros" else b"\xff") * len(gone) + after


@st.composite
def damaged_text(draw: Draw, content: bytes) -> bytes:
    """A few words, numbers or marks of a text replaced by others."""
    for _ in range(draw(_EDITS)):
        token = draw(st.sampled_from([_VALUE, _VALUE, _VALUE, _TOKEN]))
        spans = [match.span() for match in token.finditer(content)]
        if not spans:
            return content
        begin, end = draw(st.sampled_from(spans))
        content = content[:begin] + draw(_like(content[begin:end])) + content[end:]
    return content


def _like(token: bytes) -> st.SearchStrategy[bytes]:
    """Mostly a token of the same kind, so that the text stays one of its format."""
    anything = st.one_of(st.just(b""), _ODD_VALUES.map(as_json))
    if token[:1] == b'"':
        return st.one_of(_TEXT.map(as_json), _TEXT.map(as_json), anything)
    if token[:1].isdigit() or token[:1] in b"+-":
        numbers = st.sampled_from([0, -1, 1, 3, 1.5, 1e308, 10**30, *_HUGE]).map(as_json)
        return st.one_of(numbers, numbers, st.sampled_from([b"nan", b"inf", b"1e999"]), anything)
    return anything


@st.composite
def damaged_json(draw: Draw, content: bytes) -> bytes:
    """Values of other types, huge numbers, names that are not known or absent, and deep nesting; or damaged bytes."""
    kind = draw(st.sampled_from(["value", "value", "value", "value", "text", "bytes"]))
    if kind != "value":
        return draw(damaged_text(content) if kind == "text" else damaged_bytes(content))
    value = json.loads(content)
    for _ in range(draw(_EDITS)):
        value = _with_other_value(draw, value)
    return as_json(value)


def _with_other_value(draw: Draw, value: Any) -> Any:
    if isinstance(value, str) and _BASE64.fullmatch(value) and draw(st.integers(0, 3)):
        return base64.b64encode(draw(damaged_bytes(base64.b64decode(value)))).decode()
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 30)) == 0:
        return draw(_ODD_VALUES)
    # Downwards, so that a long list takes no more of the damage than the few fields beside it.
    key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    kind = draw(st.sampled_from(["within", "within", "within", "other", "without", "name", "twice"]))
    changed: Any = value.copy()
    if kind == "within":
        changed[key] = _with_other_value(draw, value[key])
    elif kind == "other":
        changed[key] = draw(_ODD_VALUES)
    elif kind == "without":
        del changed[key]
    elif isinstance(changed, dict):
        new = draw(st.sampled_from([*_TEXTS, key.upper(), key + "0", re.sub(r"\d+", "999999999", key)]))
        changed[new] = changed[key] if kind == "twice" else changed.pop(key)
    else:
        changed.insert(0, changed[key])
    return changed


def as_json(value: Any) -> bytes:
    text = json.dumps(value, allow_nan=True)
    text = text.replace(f'"{_DEEP}"', "[" * 90 + "]" * 90).replace(f'"{_DEEPER}"', "[" * 50_000 + "]" * 50_000)
    return text.encode()


@st.composite
def damaged_safetensors(draw: Draw, content: bytes) -> bytes:
    """Other tensors in a whole file; a header that says something else than it should; or any bytes."""
    kind = draw(st.sampled_from(["tensors", "tensors", "tensors", "header", "metadata", "bytes"]))
    if kind == "bytes":
        return draw(damaged_bytes(content))
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    metadata = header.get("__metadata__", {})
    if kind == "tensors" or (kind == "metadata" and not metadata):
        return save(other_tensors(draw, load(content)), metadata)
    if kind == "metadata":
        name = draw(st.sampled_from(sorted(metadata)))
        is_json = metadata[name][:1] in ("{", "[")
        text = draw(damaged_json(metadata[name].encode())).decode(errors="replace") if is_json else draw(_TEXT)
        header = as_json({**header, "__metadata__": {**metadata, name: text}})
    else:
        header = draw(damaged_json(as_json(header)))
    return len(header).to_bytes(8, "little") + header + data


@st.composite
def damaged_state(draw: Draw, content: bytes) -> bytes:
    """The same of a file that torch.save wrote, in which anything may stand among the tensors."""
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged_bytes(content))
    state = torch.load(io.BytesIO(content), weights_only=True)
    inner = state.get("state_dict", state)
    tensors = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    changed: dict[Any, Any] = {**inner, **other_tensors(draw, tensors)}
    if draw(st.booleans()):
        changed[draw(st.sampled_from([*changed, *_TEXTS, 3, None]))] = draw(st.one_of(_ODD_VALUES, _ODD_TENSORS))
    written = io.BytesIO()
    torch.save({**state, "state_dict": changed} if inner is not state else changed, written)
    return written.getvalue()


def other_tensors(draw: Draw, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names, shapes, dtypes or numbers changed; tensors that are absent, or there twice."""
    for _ in range(draw(_EDITS)):
        if not tensors:
            break
        name = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[name]
        kind = draw(st.sampled_from(["name", "absent", "twice", "shape", "dtype", "numbers"]))
        tensors = {other: value for other, value in tensors.items() if other != name or kind not in ("name", "absent")}
        if kind in ("name", "twice"):
            tensors[draw(st.sampled_from(_other_names(name)))] = tensor.clone()
        elif kind == "shape":
            tensors[name] = draw(st.sampled_from(_SHAPES))(tensor).clone(memory_format=torch.contiguous_format)
        elif kind == "dtype":
            tensors[name] = tensor.float().to(draw(st.sampled_from(_DTYPES)))
        elif kind == "numbers":
            number = draw(st.sampled_from([0.0, 1e30, -1e38, float("nan"), float("inf")]))
            tensors[name] = torch.full_like(tensor.float(), number).to(tensor.dtype)
    return tensors


def _other_names(name: str) -> list[str]:
    numbered = [re.sub(r"\d+", number, name, count=1) for number in ("1", "7", "999999999", "9" * 5000, "٣")]
    return [*numbered, f"{name}.bias", f"a.{name}", name.rpartition(".")[0] or "x", f"{name}\n", "", "a" * 5000]


_SHAPES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda tensor: tensor.reshape(-1),
    lambda tensor: tensor.mT if tensor.ndim > 1 else tensor,
    lambda tensor: tensor[1:] if tensor.ndim else tensor,
    lambda tensor: tensor[:0] if tensor.ndim else tensor,
    lambda tensor: tensor[None],
    lambda tensor: tensor.reshape(-1)[:1].reshape(()) if tensor.numel() else tensor,
    lambda tensor: tensor.repeat(3, *[1] * (tensor.ndim - 1)) if tensor.ndim else tensor,
)
_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64),
    *(torch.bool, torch.uint8, torch.int8, torch.int64),
)
_ODD_TENSORS = st.sampled_from(
    [
        torch.eye(3).to_sparse(),
        torch.empty(1, device="meta"),
        torch.ones(1).expand(10**12),
        torch.nn.Parameter(torch.ones(2)),
    ]
)
