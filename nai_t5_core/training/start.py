"""The model and the tokenizer that a run begins with."""

from __future__ import annotations

import math
import os

import torch

from nai_t5_core.facts.config import T5Config, decoder_tensors, encoder_tensors
from nai_t5_core.generation.t5 import T5
from nai_t5_core.model.layers import NoInit
from nai_t5_core.tokenizer import Tokenizer, load_tokenizer
from nai_t5_core.training.config import TrainConfig
from nai_t5_core.weights.load import load_whole


def first_model(config: TrainConfig) -> tuple[T5, Tokenizer]:
    """A float32 model with the original tensors, on the CPU, and its tokenizer.

    Raises:
        ValueError: the weights or the tokenizer cannot be read or do not go together, or the sizes are those of a
            model that is larger than this machine's memory.
    """
    section = config.model
    own = load_tokenizer(section.tokenizer) if section.tokenizer is not None else None
    if section.sizes is not None:
        _refuse_beyond_memory(section.sizes)
        model = T5(section.sizes, "separate", NoInit, device="cpu", dtype=torch.float32)
        # On the CPU, so that the same seed gives the same weights everywhere.
        model.init_weights(torch.Generator().manual_seed(config.seed))
        tokenizer = own
    else:
        loaded = load_whole(section.source, torch.float32, "cpu", layout="separate")
        model = T5(loaded.model.config, "separate", NoInit, device="cpu", dtype=torch.float32)
        # Copied, since the loaded tensors may be mapped from the file, and training changes them.
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


def _refuse_beyond_memory(sizes: T5Config) -> None:
    """Raises a ValueError where float32 weights of these sizes need more memory than the machine has."""
    if not hasattr(os, "sysconf"):  # on Windows; an allocation that fails says so there
        return
    shapes = encoder_tensors(sizes) | decoder_tensors(sizes)
    needed = 4 * sum(map(math.prod, shapes.values()))
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"model.sizes are those of a T5 of {needed / 2**30:,.0f} GiB in float32, and this machine has "
            f"{there / 2**30:,.0f} GiB of memory; give smaller ones"
        )
