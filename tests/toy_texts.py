"""Toy models that generate texts worth comparing, beside transformers' of the same weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, padding_mask, random_state
from torch import Tensor

from nai_t5_core.bench.peers import own_t5, transformers_t5
from nai_t5_core.generation.t5 import T5

END = 1
PROMPT_LENGTH = 20
NEW_TOKENS = 14


def toy_state(kind: str) -> dict[str, Tensor]:
    """Weights whose texts differ with the prompt and end after one to many tokens: sharp logits, an end in reach."""
    config = TOY_CONFIGS[kind]
    state = random_state(config, seed=3)
    head = "shared.weight" if config.tie_word_embeddings else "lm_head.weight"
    state[head] = state[head] * 1.5
    state[head][END] *= 2.2
    return state


@cache
def own_model(kind: str, dtype: torch.dtype = torch.float32) -> T5:
    return own_t5(TOY_CONFIGS[kind], toy_state(kind), dtype)


@cache
def reference_model(kind: str) -> Any:
    pytest.importorskip("transformers", reason="transformers is the oracle")
    return transformers_t5(TOY_CONFIGS[kind], toy_state(kind), torch.float32)


def prompts(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask of prompts of one to ``PROMPT_LENGTH`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, PROMPT_LENGTH + 1, (count,), generator=generator).tolist()
    mask = padding_mask(lengths, PROMPT_LENGTH)
    return torch.randint(2, 96, (count, PROMPT_LENGTH), generator=generator) * mask, mask


def cut(tokens: Tensor) -> list[list[int]]:
    """Every text up to its end token. transformers pads the texts of beams with the end token, ours with the pad."""
    return [row[: row.index(END) + 1] if END in row else row for row in tokens.tolist()]


def theirs(kind: str, ids: Tensor, mask: Tensor, **options: Any) -> list[list[int]]:
    skip_beams_of_another_search(reference_model(kind), options.get("num_beams", 1))
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **options}
    return cut(reference_model(kind).generate(ids, attention_mask=mask, **options)[:, 1:])


def skip_beams_of_another_search(reference: Any, beams: int) -> None:
    """Since 4.54 the beam search of transformers closes each prompt as ours does; the method is the one that does it.

    Up to 4.49 a prompt stays open while a text that has just ended scores better than the worst finished one, and texts
    cut at the greatest length do not compete with one that ends there and closes its prompt. From 4.50 to 4.53 all
    prompts of a batch close together.
    """
    if beams > 1 and not hasattr(reference, "_check_early_stop_heuristic"):
        pytest.skip("before 4.54 the beam search of transformers closes a prompt at another time")


def ours(kind: str, ids: Tensor, mask: Tensor, **options: Any) -> list[list[int]]:
    return cut(own_model(kind).generate(ids, mask, **{"max_new_tokens": NEW_TOKENS, **options}))
