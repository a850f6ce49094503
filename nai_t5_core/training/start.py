"""The model and the tokenizer that a run begins with."""

from __future__ import annotations

from typing import Any

import torch

from nai_t5_core.layers import NoInit
from nai_t5_core.load import load_whole
from nai_t5_core.model import T5
from nai_t5_core.tokenizer import Tokenizer, load_tokenizer
from nai_t5_core.training.config import TrainConfig


def first_model(config: TrainConfig) -> tuple[T5, Tokenizer]:
    """A float32 model with the original tensors, on the CPU, and its tokenizer.

    Raises:
        ValueError: the weights or the tokenizer cannot be read or do not go together.
    """
    section = config.model
    own = load_tokenizer(section.tokenizer) if section.tokenizer is not None else None
    if section.sizes is not None:
        model = T5(section.sizes, "separate", NoInit, device="cpu", dtype=torch.float32)
        # On the CPU, so that the same seed gives the same weights everywhere.
        model.init_weights(torch.Generator().manual_seed(config.seed))
        let_heads_match(model, section.matching_heads)
        tokenizer = own
    else:
        loaded = load_whole(section.source, torch.float32, "cpu", layout="separate")
        model = T5(loaded.model.config, "separate", NoInit, device="cpu", dtype=torch.float32)
        # Copied: the tensors that were loaded may be the file's own pages.
        model.load_state_dict(loaded.model.state_dict())
        tokenizer = own or loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"{section.source} comes without a tokenizer; give its path as model.tokenizer")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}; "
            "they do not go together"
        )
    return model.train(), tokenizer


@torch.no_grad()
def let_heads_match(model: T5, heads: int) -> None:
    """Makes the first heads of every encoder layer attend to tokens like the one they read for, itself among them.

    Their queries begin as their keys, to scale (Mimetic Initialization of Self-Attention Layers, Trockman and Kolter,
    2023). A small model may else not find in any reasonable time that a word of a question is a word of the text.

    Args:
        model: in the separate layout, with random weights.
        heads: how many in each layer; none by default.
    """
    d_kv = model.config.d_kv
    for block in model.encoder.block:
        attention: Any = block.layer[0].SelfAttention
        rows = heads * d_kv
        attention.q.weight[:rows] = attention.k.weight[:rows] * d_kv**-0.5
