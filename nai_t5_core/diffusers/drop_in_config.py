"""The config of transformers that our encoder has, and what transformers calls the encoder of each kind."""

from __future__ import annotations

import copy

from transformers import MT5Config, PretrainedConfig, T5Config, UMT5Config

from nai_t5_core.facts.config import config_to_hf
from nai_t5_core.weights.examine import Examination

_CONFIG_CLASSES = {"t5": T5Config, "mt5": MT5Config, "umt5": UMT5Config}
# What transformers calls the encoder of each model type.
ENCODER_CLASSES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}


def own_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy, since models write into their config."""
    own = copy.deepcopy(config)
    own._attn_implementation = "sdpa"
    own.is_encoder_decoder = own.use_cache = False
    return own


def config_beside(examination: Examination) -> PretrainedConfig:
    """The config.json beside the weights, or one made of what the weights tell."""
    values = examination.checkpoint.hf_config() or {}
    if values.get("model_type") not in _CONFIG_CLASSES:
        values = config_to_hf(examination.config.encoder_only())
    values = {name: value for name, value in values.items() if name not in ("dtype", "torch_dtype")}
    return _CONFIG_CLASSES[values["model_type"]](**values)
