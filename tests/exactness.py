"""Counts where generated texts differ from those of transformers, over every setting that is promised to be exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.generation.t5 import T5

BEAM_SETTINGS = [
    {"num_beams": beams, "length_penalty": penalty, "early_stopping": early}
    for beams, penalty, early in product((2, 4, 8), (0.6, 1.0, 2.0), (False, True, "never"))
]
SETTINGS: list[dict[str, Any]] = [{"num_beams": 1}, *BEAM_SETTINGS]

# Ids, mask and options to a text for each prompt, up to its end token.
Texts = Callable[..., list[list[int]]]


@dataclass
class Differences:
    """What :func:`compare` has counted; ``unexplained`` has options, prompt, both texts and both scores."""

    prompts: int
    compared: int = 0
    ties: int = 0
    unexplained: list[tuple[Any, ...]] = field(default_factory=list)
    lengths: Counter[int] = field(default_factory=Counter)
    distinct: set[tuple[int, ...]] = field(default_factory=set)

    def __str__(self) -> str:
        return (
            f"{self.compared} texts ({self.prompts} prompts, {len(SETTINGS)} settings), {len(self.distinct)} of them "
            f"distinct; different from transformers: {self.ties} ties within 1e-6, {len(self.unexplained)} others"
        )


def compare(ids: Tensor, mask: Tensor, ours: Texts, theirs: Texts, exact: T5) -> Differences:
    """Over all settings. Two texts tie whose scores, by the ``exact`` model in float64, are the same to 1e-6."""
    counted = Differences(len(ids))
    for options in SETTINGS:
        expected, found = theirs(ids, mask, **options), ours(ids, mask, **options)
        assert len(found) == len(ids)
        for index in (index for index in range(len(ids)) if found[index] != expected[index]):
            texts = (found[index], expected[index])
            penalty = options.get("length_penalty", 1.0)
            scores = [log_probability(exact, ids[index], mask[index], text) / len(text) ** penalty for text in texts]
            if abs(scores[0] - scores[1]) <= 1e-6:
                counted.ties += 1
            else:
                counted.unexplained.append((options, index, *texts, scores))
        counted.compared += len(ids)
        counted.lengths.update(map(len, found))
        counted.distinct.update(map(tuple, found))
    return counted


def log_probability(model: T5, ids: Tensor, mask: Tensor, text: list[int]) -> float:
    """Of a text for one prompt."""
    labels = torch.tensor([text])
    logits = model(ids[None], mask[None], labels=labels).logits
    return float(logits.log_softmax(-1).gather(2, labels[:, :, None]).sum())
