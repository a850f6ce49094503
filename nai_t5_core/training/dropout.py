"""Dropout in T5's places: on embeddings, attention weights, outputs of sublayers, the feed-forward's hidden values and
the output of each stack.

It is added to a model by hooks, so that the model classes have no dropout. The dropped values depend on the seed and
the number of the batch only, so that a resumed run drops the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nai_t5_core.generation.t5 import T5
from nai_t5_core.model.attention import DocumentAttention
from nai_t5_core.model.decoder_attention import CausalAttention, CrossMemory

_SUBLAYERS = ("SelfAttention", "EncDecAttention", "DenseReluDense")
_ATTENDING = (DocumentAttention, CausalAttention, CrossMemory)


def add_dropout(model: T5, rate: float) -> None:
    """Adds dropout of this rate to a model, in training mode."""

    def drop(module: nn.Module, values: Tensor) -> Tensor:
        return F.dropout(values, rate, module.training)

    def drop_output(module: nn.Module, _: Any, out: Tensor) -> Tensor:
        return drop(module, out)

    def drop_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (drop(module, inputs[0]),)

    def enter_stack(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Changes the arguments of a stack: embeddings, then attention plans, then the dtype."""
        embeddings, *others = inputs
        attention_rate = rate if module.training else 0.0
        return drop(module, embeddings), *(_dropping(other, attention_rate) for other in others)

    for stack in (model.encoder, model.decoder):
        stack.register_forward_pre_hook(enter_stack)
        stack.register_forward_hook(drop_output)
        for name, module in stack.named_modules():
            last = name.rpartition(".")[2]
            if last in _SUBLAYERS:
                module.register_forward_hook(drop_output)
            elif last == "wo":
                module.register_forward_pre_hook(drop_input)


def _dropping(value: Any, rate: float) -> Any:
    """An attention plan with dropout of this rate; any other value as it is."""
    return dataclasses.replace(value, dropout=rate) if isinstance(value, _ATTENDING) else value


@contextmanager
def drawn_for(seed: int, number: int, rank: int, device: torch.device) -> Iterator[None]:
    """Within this context torch's random numbers are those of a batch; afterwards its generators are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([seed, number, rank]).generate_state(1)[0]))
        yield
