"""AdamW and Adafactor, torch's own, and how the learning rate goes from step to step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from nai_t5_core.training.config import OptimizerSection


def make_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer of a float32 model. Each group has a ``factor``, which multiplies the learning rate of every step.

    Norm weights and position biases are not decayed. Embeddings and position biases have a factor of their own.
    """
    factor = section.table_factor
    matrices = {"params": list[nn.Parameter](), "weight_decay": section.weight_decay, "factor": 1.0}
    embeddings = {"params": list[nn.Parameter](), "weight_decay": section.weight_decay, "factor": factor}
    positions = {"params": list[nn.Parameter](), "weight_decay": 0.0, "factor": factor}
    norms = {"params": list[nn.Parameter](), "weight_decay": 0.0, "factor": 1.0}
    kinds: dict[str, dict[str, Any]] = {
        "layer_norm": norms,
        "relative_attention_bias": positions,
        "shared": embeddings,
    }
    for name, parameter in model.named_parameters():
        group = next((group for part, group in kinds.items() if part in name), matrices)
        group["params"].append(parameter)
    groups = [matrices, embeddings, positions, norms]
    if section.kind == "adamw":
        return torch.optim.AdamW(groups, lr=section.learning_rate, betas=section.betas)
    return torch.optim.Adafactor(groups, lr=section.learning_rate)


def refuse_unsharded(section: OptimizerSection) -> None:
    """Raises a ValueError for an optimizer whose state torch cannot spread over processes."""
    # It works on sums over rows and columns in place, which torch 2.13 refuses for spread tensors.
    if section.kind == "adafactor":
        raise ValueError('torch\'s Adafactor cannot train a model that is spread over processes; use kind = "adamw"')


def learning_rate(section: OptimizerSection, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, of a run of ``steps``. Never 0 at a step that is taken."""
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
