"""What a TextEncoder needs of whatever encodes for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nai_t5_core.facts.padding import PaddingPolicy
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.weights.load_report import LoadReport

# The most rows computed in one pass. Activations of T5-XXL take about 100 kB per row, so this is well under 1 GB.
DEFAULT_TOKEN_BUDGET = 8192


@dataclass(frozen=True)
class Pads:
    """What is done with pads, see :func:`nai_t5_core.model.packing.pack_batch`, and how many rows fit into a pass."""

    padding: PaddingPolicy
    extra_pad: int
    token_budget: int


class Encoding(Protocol):
    """What a :class:`nai_t5_core.TextEncoder` encodes with.

    Attributes:
        stack: the encoder, which may be loaded for this.
        report: of its loading; None where it is not known, or it is not loaded.
        source: of its weights, for people; None where it is not known.
    """

    source: str | None

    @property
    def stack(self) -> T5EncoderStack: ...

    @property
    def report(self) -> LoadReport | None: ...

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        ...

    def __call__(self, ids: Tensor, mask: Tensor, pads: Pads, device: str | torch.device | None) -> Tensor:
        """Hidden states [batch, length, d_model] of ids and mask [batch, length], on a device or the model's own."""
        ...
