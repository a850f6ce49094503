"""One embedding as the content of a file, and back: every number of it is checked before it is given out.

A safetensors file with ``rows`` [rows, d_model] and, in 8 bits, ``row_scales`` [rows, 1] and ``channel_scales``
[d_model]. ``extra.<name>`` are tensors of any kind that go with them. Its metadata has the key, the dtype that was
computed in, the form it is kept in, and a checksum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from nai_t5_core.facts.nested_text import parse_object
from nai_t5_core.model.precision import DTYPES
from nai_t5_core.prompts.cache.key import Key
from nai_t5_core.weights.formats import tensor_bytes

FORMAT = "comfy-nai-t5 embedding"
SCHEMA = "1"

# How the numbers are kept: as they were computed, or smaller.
Form = Literal["computed", "bfloat16", "float16", "int8"]
FORMS: tuple[Form, ...] = get_args(Form)
_EXTRA = "extra."
_TENSORS = {"int8": {"rows", "row_scales", "channel_scales"}}
# The steps of 8 bits on each side of zero.
_STEPS = 127


class DamagedEntryError(ValueError):
    """The content of a file is no whole entry; the message says why."""


@dataclass(frozen=True)
class Entry:
    """An embedding with what it is kept under.

    Attributes:
        key: of whatever the file holds; to be compared with the key that is looked for.
        form: how the numbers were kept; rounded unless that is ``"computed"``.
        rows: [rows, d_model] in the dtype that was computed in.
        extras: tensors that go with them, by name; as they were.
    """

    key: Key
    form: Form
    rows: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)


def to_bytes(
    key: Key, rows: Tensor, form: Form = "computed", extras: Mapping[str, Tensor] = MappingProxyType({})
) -> bytes:
    """The content of a file for these rows [rows, d_model], and what goes with them.

    Where a smaller form would lose a number to infinity, or would not be smaller, the rows are kept as computed.
    """
    tensors, kept_as = _kept(rows, form)
    tensors |= {f"{_EXTRA}{name}": tensor.contiguous() for name, tensor in extras.items()}
    metadata = {
        "format": FORMAT,
        "schema": SCHEMA,
        "key": key.text,
        "dtype": str(rows.dtype).removeprefix("torch."),
        "form": kept_as,
        "sha256": _checksum(tensors),
    }
    return save(tensors, metadata)


def from_bytes(content: bytes) -> Entry:
    """The inverse of :func:`to_bytes`.

    Raises:
        DamagedEntryError: it is no entry, of another schema, or not as it was written.
    """
    metadata = _metadata(content)
    if metadata.get("format") != FORMAT:
        raise DamagedEntryError("it is no embedding of this program")
    if metadata.get("schema") != SCHEMA:
        raise DamagedEntryError(f"it has schema {metadata.get('schema')!r}, and this program reads {SCHEMA}")
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DamagedEntryError(f"it is damaged: {error}") from error
    dtype, form = DTYPES.get(metadata.get("dtype", "")), metadata.get("form", "")
    expected = _TENSORS.get(form, {"rows"})
    extras = {name.removeprefix(_EXTRA): tensor for name, tensor in tensors.items() if name.startswith(_EXTRA)}
    own = {name for name in tensors if not name.startswith(_EXTRA)}
    if dtype is None or form not in FORMS or own != expected or not isinstance(metadata.get("key"), str):
        raise DamagedEntryError("its header is damaged")
    if _checksum(tensors) != metadata.get("sha256"):
        raise DamagedEntryError("its numbers are not those that were written")
    return Entry(Key(metadata["key"]), form, _given_out(tensors, form, dtype), extras)


def _metadata(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise DamagedEntryError("it is cut off")
    try:
        metadata = parse_object(content[8 : 8 + length]).get("__metadata__")
    except ValueError as error:
        raise DamagedEntryError(f"its header is damaged: {error}") from error
    if not isinstance(metadata, dict):
        raise DamagedEntryError("it is no embedding of this program")
    return metadata


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _kept(rows: Tensor, form: Form) -> tuple[dict[str, Tensor], Form]:
    """The tensors that a form consists of, and the form that it became."""
    if form == "int8":
        return _in_8_bits(rows), form
    if form != "computed":
        smaller = rows.to(DTYPES[form])
        if smaller.dtype.itemsize < rows.dtype.itemsize and bool(smaller.isfinite().all()):
            return {"rows": smaller.contiguous()}, form
    return {"rows": _as_small_as_without_loss(rows)}, "computed"


def _as_small_as_without_loss(rows: Tensor) -> Tensor:
    """The same numbers in half precision if they all fit there, as those do that were only widened."""
    for dtype in (torch.bfloat16, torch.float16):
        if dtype.itemsize < rows.dtype.itemsize:
            smaller = rows.to(dtype)
            if torch.equal(smaller.to(rows.dtype), rows):
                return smaller.contiguous()
    return rows.contiguous()


def _in_8_bits(rows: Tensor) -> dict[str, Tensor]:
    """A scale for each channel, since some are hundreds of times larger than others, and one for each row."""
    values = rows.float()
    tiny = torch.finfo(torch.float32).tiny
    # Rounded first, so that their rounding is none of the result's.
    channels = values.abs().amax(dim=0).clamp_min(tiny).bfloat16()
    values = values / channels.float()
    steps = (values.abs().amax(dim=1, keepdim=True) / _STEPS).clamp_min(tiny)
    return {"rows": (values / steps).round().to(torch.int8), "row_scales": steps, "channel_scales": channels}


def _given_out(tensors: dict[str, Tensor], form: str, dtype: torch.dtype) -> Tensor:
    rows = tensors["rows"]
    halves = {torch.bfloat16, torch.float16} if dtype.itemsize > 2 else set()
    stored = {"computed": {dtype} | halves, "int8": {torch.int8}}.get(form) or {DTYPES[form]}
    if rows.ndim != 2 or not rows.numel() or rows.dtype not in stored:
        raise DamagedEntryError(f"it holds {rows.dtype} {list(rows.shape)}")
    if form == "int8":
        steps, channels = tensors["row_scales"], tensors["channel_scales"]
        if steps.shape != (rows.shape[0], 1) or channels.shape != rows.shape[1:]:
            raise DamagedEntryError(f"its scales have shapes {list(steps.shape)} and {list(channels.shape)}")
        rows = rows.float() * steps.float() * channels.float()
    return rows.to(dtype)
