"""Encoders whose layers are offloaded, on a simulated device."""

from __future__ import annotations

from typing import Any

import torch
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from simulated_device import SimulatedDevice

from nai_t5_core.backends.offload.offload import offload_layers
from nai_t5_core.backends.offload.weights import weights_of
from nai_t5_core.facts.config import T5Config
from nai_t5_core.model.encoder import Layout, T5EncoderStack
from nai_t5_core.weights.examine import examine

CONFIG = TOY_CONFIGS["v1.1"].encoder_only()
EMBEDDED = examine(None).config.encoder_only()
# What every kind can keep.
WIDE = CONFIG.model_copy(update={"d_model": 256, "d_kv": 64, "d_ff": 256})
MASK = padding_mask([0, 3, 11, 4], 11)
IDS = torch.randint(0, 96, MASK.shape, generator=torch.Generator().manual_seed(5))


def of_layers(layers: int, config: T5Config = CONFIG) -> T5Config:
    return config.model_copy(update={"num_layers": layers})


def resident(config: T5Config = CONFIG, dtype: torch.dtype = torch.float32, layout: Layout = "fused") -> T5EncoderStack:
    """Computed by its modules, as an offloaded one is."""
    stack = build_stack(config, random_state(config), dtype, layout)
    for block in stack.encoder.block:
        block.runner = None
    return stack


def offloaded(stack: T5EncoderStack, device: SimulatedDevice) -> T5EncoderStack:
    """The same stack, with a device that is simulated."""
    offload: Any = offload_layers(stack).offload
    offload.start(stack, device)
    return stack


def largest_layer(stack: T5EncoderStack) -> int:
    return max(sum(-(-weight.nbytes // 256) * 256 for weight in weights_of(block)) for block in stack.encoder.block)
