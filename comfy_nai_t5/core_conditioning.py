"""The conditioning files of ComfyUI's own nodes (Save Conditioning, Load Conditioning), which hold one entry.

A safetensors file with the tensor ``conditioning``, every other tensor of the entry under its own name, those of a list
under ``name.0``, ``name.1``…, and the rest of the entry as JSON in the metadata ``conditioning_options``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nai_t5_core.facts.nested_text import parse_object

TENSOR, OPTIONS = "conditioning", "conditioning_options"


def to_core(conditioning: list[Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of such a file.

    Raises:
        ValueError: there are several entries, or one that holds something else than tensors, numbers and texts.
    """
    if len(conditioning) != 1:
        raise ValueError(f"ComfyUI's file holds one entry, and this conditioning has {len(conditioning)}; save as ours")
    states, extras = conditioning[0]
    tensors, options = {TENSOR: states}, {}
    for name, value in extras.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, list | tuple) and value and all(isinstance(each, Tensor) for each in value):
            tensors |= {f"{name}.{index}": each for index, each in enumerate(value)}
        else:
            options[name] = value
    if len(tensors) < 1 + sum(isinstance(value, Tensor) for value in extras.values()):
        raise ValueError(f"an entry of this conditioning is called {TENSOR!r} as well; save as ours")
    try:
        return tensors, {OPTIONS: json.dumps(options)}
    except TypeError as error:
        raise ValueError(
            f"this conditioning cannot be written to a file ({error}); save it before hooks or masks"
        ) from error


def is_core(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are those of such a file."""
    return TENSOR in tensors


def from_core(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[Any]:
    """The inverse of :func:`to_core`.

    Raises:
        ValueError: the file is damaged.
    """
    options: dict[str, Any] = parse_object(metadata.get(OPTIONS, "{}"))
    lists: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, number = name.rpartition(".")
        if stem and number.isascii() and number.isdigit() and len(number) < 9:
            lists.setdefault(stem, {})[int(number)] = tensor
        elif name != TENSOR:
            options[name] = tensor
    for name, found in lists.items():
        options[name] = [found[index] for index in sorted(found)]
    return [[tensors[TENSOR], options]]
