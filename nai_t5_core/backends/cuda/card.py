"""Which GPU a device is, by a name that tells makers apart."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

# What the kernels were compiled for without a card, see tests/compile_for_gpus.py.
COMPILED_FOR_AMD = ("gfx90a", "gfx942", "gfx1100")


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: such as ``"NVIDIA H200"``.
        architecture: ``"sm_90"`` of NVIDIA's, ``"gfx942"`` of AMD's. AMD's have compute capabilities, too, which torch
            makes of these names, and which mean nothing beside NVIDIA's: that of gfx90a is 9.0, as of an H100.
    """

    name: str
    architecture: str

    @property
    def is_amd(self) -> bool:
        return self.architecture.startswith("gfx")

    @property
    def capability(self) -> tuple[int, int]:
        """NVIDIA's compute capability; (0, 0) of other makers' cards."""
        number = re.fullmatch(r"sm_(\d+)(\d)", self.architecture)
        return (int(number[1]), int(number[2])) if number else (0, 0)

    @property
    def converts_float8(self) -> bool:
        """Whether it has instructions for float8."""
        return self.capability >= (8, 9)

    @property
    def can_overlap(self) -> bool:
        """Whether a launch can start while those before it still run (programmatic dependent launch)."""
        return self.capability >= (9, 0)


def card_of(device: torch.device) -> Card | None:
    """The GPU of a device; None where it is none, or torch cannot use it here."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Card(properties.name, properties.gcnArchName.partition(":")[0])
    return Card(properties.name, f"sm_{properties.major}{properties.minor}")
