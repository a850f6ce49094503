"""Toy encoders of transformers, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from checkpoints import encoder_part
from conftest import TOY_CONFIGS, padding_mask, random_state
from torch import Tensor, nn

from nai_t5_core.bench.peers import transformers_encoder
from nai_t5_core.facts.config import T5Config


def hf_model(config: T5Config, state: dict[str, Tensor] | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    model: Any = transformers_encoder(config.encoder_only(), encoder_part(state or random_state(config)), dtype)
    model.tie_weights()
    return model


def ids_for(config: T5Config) -> Tensor:
    return torch.randint(2, config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(1))


def assert_near(ours: Tensor, reference: Tensor, relative: float = 1e-5) -> None:
    """Equal up to a share of the largest value."""
    assert ours.shape == reference.shape
    assert ours.dtype == reference.dtype
    assert (ours - reference).abs().max() <= relative * reference.abs().max()


V1_1_IDS = ids_for(TOY_CONFIGS["v1.1"])
MASK = padding_mask([5, 12, 1, 8], 12)


def encode_in_a_process(source: Any) -> Any:
    """What another process gets from a folder that it loads, or from a model that is sent to it."""
    from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel

    model = source if isinstance(source, NAIT5EncoderModel) else NAIT5EncoderModel.from_pretrained(source)
    with torch.no_grad():
        return model(V1_1_IDS, MASK)[0].numpy()
