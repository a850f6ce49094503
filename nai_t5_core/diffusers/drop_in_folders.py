"""Folders that the drop-in class reads and writes: which file, which device, in our format or in transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from nai_t5_core.diffusers.drop_in_weights import original_tensors
from nai_t5_core.facts.config import Shape, encoder_tensors
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.weights import native
from nai_t5_core.weights.convert import HashingReader
from nai_t5_core.weights.formats import Checkpoint, CheckpointError, open_checkpoint, write_safetensors
from nai_t5_core.weights.fuse import cook, fused_recipes
from nai_t5_core.weights.hub import HubOptions, find_model
from nai_t5_core.weights.whole_files import write_whole

# Names of accelerate for device maps that it makes itself.
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def weights_name(variant: str | None) -> str:
    """The name of a folder's weight file, such as ``model.fp16.safetensors``."""
    return f"model.{variant}.safetensors" if variant else "model.safetensors"


def open_source(source: str | Path | None, subfolder: str, hub: HubOptions, variant: str | None) -> Checkpoint:
    """The checkpoint of a hub id, a folder or a file; of a folder, that with the name of a variant.

    Raises:
        CheckpointError: it cannot be read, or there is no such variant.
    """
    path = find_model(source, subfolder, hub)
    if variant is None:
        return open_checkpoint(path)
    file = path / weights_name(variant)
    if not file.is_file():
        raise CheckpointError(f"{path} has no {file.name}; leave out variant={variant!r}, or give a folder that has it")
    checkpoint = open_checkpoint(file)
    checkpoint.folder = path
    return checkpoint


def single_device(device_map: Any) -> str | torch.device:
    """The device of a ``device_map`` that puts all on one; the CPU where there is none.

    ``"auto"`` and the other strategies of accelerate choose it: they spread no model that one device can hold.

    Raises:
        ValueError: it spreads the model.
    """
    device = device_map
    if isinstance(device_map, dict) and device_map:
        devices = list(device_map.values())
        device = devices[0] if devices.count(devices[0]) == len(devices) else device_map
    if device is None:
        return "cpu"
    if isinstance(device, int):
        accelerator = torch.accelerator.current_accelerator()
        return torch.device("cuda" if accelerator is None else accelerator.type, device)
    if not isinstance(device, str | torch.device) or device == "disk":
        raise ValueError(f"device_map={device_map!r}; the whole model goes to one device, such as 'cuda' or {{'': 0}}")
    return "auto" if device in _STRATEGIES else device


def write_config(folder: Path, values: dict[str, Any], class_name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # How a checkpoint was quantised: what is written here is unpacked.
    values = {name: value for name, value in values.items() if name != "quantization_config"}
    text = json.dumps({**values, "architectures": [class_name]}, indent=2, sort_keys=True)
    write_whole(folder / "config.json", text + "\n")


def write_native(stack: T5EncoderStack, file: Path, source: str) -> None:
    """Writes our own format: the fused tensors, with config and scales in the header."""
    recipes = fused_recipes(stack.config, stack.scales)
    state = stack.state_dict()
    # The hash is that of the tensors in memory: what file they came from is not known any more.
    read = HashingReader((state if stack.layout == "fused" else dict(original_tensors(stack))).__getitem__)
    chosen = native.stored(recipes) if stack.layout == "fused" else recipes
    layout = {recipe.target: (recipe.dtype(stack.dtype), recipe.shape) for recipe in chosen}
    scales = None if stack.scales.is_one else stack.scales
    write_safetensors(
        file,
        layout,
        ((recipe.target, cook(recipe, read, stack.dtype)) for recipe in chosen),
        lambda: native.header(stack.config, source, read.hexdigest(), scales),
    )


def write_originals(stack: T5EncoderStack, file: Path) -> None:
    """Writes the original tensors, as transformers reads them, in the dtype of the model."""
    shapes: dict[str, Shape] = encoder_tensors(stack.config)
    fused = [part for recipe in fused_recipes(stack.config) for part in recipe.parts]
    names = fused if stack.layout == "fused" else list(stack.state_dict())
    originals = ((name, tensor.to(stack.dtype)) for name, tensor in original_tensors(stack))
    write_safetensors(file, {name: (stack.dtype, shapes[name]) for name in names}, originals, {"format": "pt"})
