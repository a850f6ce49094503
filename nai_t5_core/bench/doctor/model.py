"""The model that is timed: random weights in a published size, or one that a user has."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

import torch

from nai_t5_core.bench.doctor.hollow import write_hollow
from nai_t5_core.bench.peers import State, hf_state, own_encoder, random_state
from nai_t5_core.facts.config import NAMED_CONFIGS, T5Config, encoder_tensors, named_config
from nai_t5_core.facts.paths import user_path
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.weights.examine import examine
from nai_t5_core.weights.load import load_encoder


class RandomModel:
    """Random weights in a published size.

    Raises:
        ValueError: there is no such size.
    """

    def __init__(self, size: str, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self._dtype, self._device = size, dtype, device
        self.words = f"{size} with random weights"
        self.config = named_config(size).encoder_only()
        self.quantised_bytes: int | None = None

    @cached_property
    def state(self) -> State:
        """Its weights under Hugging Face names, drawn on the device."""
        return random_state(self.config, dtype=self._dtype, device=self._device)

    @cached_property
    def stack(self) -> T5EncoderStack:
        """Our encoder with these weights, on the device."""
        return own_encoder(self.config, self.state, self._dtype)

    def on_disk(self, folder: Path) -> str:
        """A checkpoint of this size in an empty folder, whose weights are zeros: it takes no room."""
        return str(write_hollow(folder / "zeros.safetensors", self.config, self._dtype))


class GivenModel:
    """The encoder of a hub id, a folder or a file. No weight is read before it is asked for.

    Raises:
        CheckpointError: a ValueError that says why it cannot be loaded.
    """

    def __init__(self, source: str, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self._dtype, self._device = source, dtype, device
        self._examination = examine(source)
        self._examination.config = self._examination.config.encoder_only()
        self._examination.refuse_faults()
        self.words = source
        self.config = self._examination.config
        # What it takes where its weights are quantised, and stay so.
        self.quantised_bytes = self._examination.encoder_bytes if self._examination.quantised else None

    @cached_property
    def state(self) -> State:
        """Its weights under Hugging Face names, on the device; quantised ones are unpacked."""
        return {name: tensor.to(self._device, self._dtype) for name, tensor in hf_state(self._examination).items()}

    @cached_property
    def stack(self) -> T5EncoderStack:
        """Our encoder as it is loaded, so that quantised weights stay as they lie."""
        return load_encoder(self.name, self._dtype, self._device)

    def on_disk(self, folder: Path) -> str:
        """Where it is."""
        return self.name


def model_of(name: str, dtype: torch.dtype, device: torch.device) -> RandomModel | GivenModel:
    """The model of this name. A published size goes before a folder of its name: ``./t5-small`` is the folder.

    Raises:
        ValueError: it is no published size and leads to no model.
    """
    is_a_place = len(Path(name).parts) > 1 or Path(name).suffix != "" or user_path(name).exists()
    kind = GivenModel if name not in NAMED_CONFIGS and is_a_place else RandomModel
    return kind(name, dtype, device)


def weight_bytes(config: T5Config) -> tuple[int, int]:
    """Bytes of an encoder's weights in 16 bits, and with its projections in 8; norms are in float32."""
    sizes = {name: math.prod(shape) for name, shape in encoder_tensors(config.encoder_only()).items()}
    norms = sum(count for name, count in sizes.items() if "layer_norm" in name)
    tables = sum(count for name, count in sizes.items() if "shared." in name or "relative_attention_bias" in name)
    projections = sum(sizes.values()) - norms - tables
    return 4 * norms + 2 * tables + 2 * projections, 4 * norms + 2 * tables + projections
