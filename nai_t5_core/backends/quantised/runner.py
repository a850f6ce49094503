"""The backend of blocks whose weights stay quantised, of whatever kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nai_t5_core.backends.held import original_weight
from nai_t5_core.backends.products import projections
from nai_t5_core.backends.quantised.forms import QuantisedForm
from nai_t5_core.backends.quantised.kernels import BY_QUANTISED_WEIGHTS, runner_of_quantised
from nai_t5_core.backends.quantised.kinds import QuantisedWeight
from nai_t5_core.backends.quantised.projections import QuantisedLinear
from nai_t5_core.model.block import Block
from nai_t5_core.model.layers import FusedGatedFeedForward


@dataclass(frozen=True)
class QuantisedBackend:
    """Keeps the weights of a block's projections quantised; the kernels compute the block where they can.

    Attributes:
        pack: makes such a weight of a plain one [rows, columns] in float32.
    """

    pack: Callable[[Tensor], QuantisedWeight]
    name: str = BY_QUANTISED_WEIGHTS

    def missing(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def refuses(self, block: Block, dtype: torch.dtype) -> str | None:
        return None

    def bind(self, block: Block, dtype: torch.dtype) -> None:
        """Each original weight is let go after it was packed."""
        for layer in block.layer:
            for sublayer in layer.children():
                for owner, attribute, name in projections(sublayer):
                    weight = original_weight(getattr(owner, attribute))
                    plain = weight if isinstance(weight, Tensor) else weight.plain()
                    # Gate and up have scales of their own in float16.
                    parts = 2 if isinstance(sublayer, FusedGatedFeedForward) and name == "wi" else 1
                    forms = [QuantisedForm(self.pack(part.float())) for part in plain.chunk(parts)]
                    setattr(owner, attribute, QuantisedLinear(forms, dtype))
        block.runner = runner_of_quantised(block)
