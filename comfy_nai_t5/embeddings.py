"""Conditioning as a safetensors file, so that a prompt is encoded once and for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from comfy_nai_t5.core_conditioning import OPTIONS, from_core, is_core, to_core
from nai_t5_core.facts.nested_text import parse_json
from nai_t5_core.weights.whole_files import replacing

FORMAT = "nai-t5-conditioning"
FORMAT_VERSION = "1"


def save_conditioning(conditioning: list[Any], path: Path, **facts: str) -> Path:
    """Writes a conditioning: its tensors as they are, numbers and texts beside them in the header.

    Args:
        conditioning: as ComfyUI passes it: pairs of a tensor and a dictionary.
        facts: what the user may want to know later: the text, the model.

    Raises:
        ValueError: the conditioning holds something else than tensors, numbers and texts, such as hooks; or the disk is
            full, and what was there before stays.
    """
    tensors: dict[str, Tensor] = {}
    entries = []
    for index, (states, extras) in enumerate(conditioning):
        tensors[f"{index}.cond"] = _of_its_own(states)
        entries.append({name: value for name, value in extras.items() if not isinstance(value, Tensor)})
        tensors |= {
            f"{index}.{name}": _of_its_own(value) for name, value in extras.items() if isinstance(value, Tensor)
        }
    try:
        header = json.dumps(entries)
    except TypeError as error:
        raise ValueError(
            f"this conditioning cannot be written to a file ({error}); save it before hooks or masks"
        ) from error
    _write(path, tensors, {"format": FORMAT, "format_version": FORMAT_VERSION, "entries": header, **facts})
    return path


def save_core_conditioning(conditioning: list[Any], path: Path, **facts: str) -> Path:
    """As :func:`save_conditioning`, in the form that ComfyUI's own Load Conditioning reads.

    Raises:
        ValueError: as :func:`save_conditioning`; or the conditioning has several entries.
    """
    tensors, metadata = to_core(conditioning)
    _write(path, {name: _of_its_own(tensor) for name, tensor in tensors.items()}, {**facts, **metadata})
    return path


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file(tensors, partial, metadata)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be written ({error}); make room, or choose another name") from error


def _of_its_own(tensor: Tensor) -> Tensor:
    """A copy: entries of a conditioning may share their tensors, and the format keeps no two in one place."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def embedding_path(folder: Path, name: str) -> Path:
    """The file of an embedding in its folder.

    Raises:
        ValueError: the name leads out of the folder.
    """
    stem = name.removesuffix(".safetensors")
    if not stem or stem != Path(stem).name or stem.startswith("."):
        raise ValueError(f"{name!r} is no file name; give one without folders")
    return folder / f"{stem}.safetensors"


def load_conditioning(path: Path) -> tuple[list[Any], dict[str, str]]:
    """The inverse of :func:`save_conditioning`: the conditioning, and the facts. Reads ComfyUI's own files, too.

    Raises:
        ValueError: no file, another kind of file, or a damaged one.
    """
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in path.parent.glob("*.safetensors"))) or "none"
        raise ValueError(f"there is no embedding {path.name}; there are: {found}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} cannot be read ({error}); save the embedding again") from error
    if is_core(tensors):
        try:
            conditioning = from_core(tensors, facts)
        except ValueError as error:
            raise ValueError(f"{path.name} is damaged ({error}); save the conditioning again") from error
        return conditioning, {name: fact for name, fact in facts.items() if name != OPTIONS}
    if (facts.pop("format", None), facts.pop("format_version", None)) != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"{path.name} was written neither by Save T5 Embedding nor by Save Conditioning; choose one")
    try:
        entries = parse_json(facts.pop("entries", ""))
        return _conditioning(entries, tensors), facts
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged ({error}); save the embedding again") from error


def _conditioning(entries: Any, tensors: dict[str, Tensor]) -> list[Any]:
    """Raises a ValueError where what the header says beside the tensors does not belong to them."""
    if not isinstance(entries, list) or not all(isinstance(extras, dict) for extras in entries):
        raise ValueError("its header has no list of entries")
    conditioning = []
    for index, extras in enumerate(entries):
        own = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{index}.")}
        if "cond" not in own:
            raise ValueError(f"it has no tensor {index}.cond")
        conditioning.append([own.pop("cond"), {**extras, **own}])
    return conditioning


def describe(conditioning: list[Any]) -> str:
    """Shapes and dtypes of a conditioning in words."""
    lines = []
    for states, extras in conditioning:
        parts = [f"{list(states.shape)} {str(states.dtype).removeprefix('torch.')}"]
        parts += [f"{name} {list(value.shape)}" for name, value in extras.items() if isinstance(value, torch.Tensor)]
        lines.append(", ".join(parts))
    return "\n".join(lines)
