"""torch's AdamW and Adafactor, and the schedule of the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from nai_t5_core.training.config import OptimizerSection


@dataclass
class _Group:
    """A parameter group, with torch's names for its settings."""

    weight_decay: float
    factor: float
    params: list[nn.Parameter] = field(default_factory=list)


def make_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer of a float32 model. Each group has a ``factor`` for the learning rate of every step.

    Norm weights and position biases have no weight decay. Embeddings and position biases have ``table_factor`` as
    factor.
    """
    matrices = _Group(section.weight_decay, 1.0)
    kinds = {
        "layer_norm": _Group(0.0, 1.0),
        "relative_attention_bias": _Group(0.0, section.table_factor),
        "shared": _Group(section.weight_decay, section.table_factor),
    }
    for name, parameter in model.named_parameters():
        group = next((group for part, group in kinds.items() if part in name), matrices)
        group.params.append(parameter)
    groups = [vars(group) for group in (matrices, *kinds.values())]
    if section.kind == "adamw":
        return torch.optim.AdamW(groups, lr=section.learning_rate, betas=section.betas)
    return torch.optim.Adafactor(groups, lr=section.learning_rate)


def refuse_unsharded(section: OptimizerSection) -> None:
    """Raises a ValueError for an optimizer whose state torch cannot shard."""
    # Adafactor changes sums over rows and columns in place, which torch 2.13 refuses for sharded tensors.
    if section.kind == "adafactor":
        raise ValueError('torch\'s Adafactor cannot train a model that is spread over processes; use kind = "adamw"')


def learning_rate(section: OptimizerSection, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, in a run of ``steps``. It is above 0 for every step of the run."""
    if step < section.warmup:
        return section.learning_rate * (step + 1) / section.warmup
    done = (step - section.warmup) / max(1, steps - section.warmup)
    factors = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "inverse-sqrt": math.sqrt(max(1, section.warmup) / max(1, step)),
    }
    return section.learning_rate * factors[section.schedule]
