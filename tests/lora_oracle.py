"""LoRA on our encoders, and on transformers' own as the oracle: its weights are neither fused nor scaled."""

from __future__ import annotations

import pytest
import torch
from checkpoints import encoder_part
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from torch import Tensor
from toy_loras import with_loras

from nai_t5_core.bench.peers import transformers_encoder
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import LayerScales, StackScales
from nai_t5_core.lora.files import Lora
from nai_t5_core.model.encoder import Layout, T5EncoderStack
from nai_t5_core.model.layers import NoInit
from nai_t5_core.weights.fuse import cook, fused_recipes, separate_recipes

KINDS = ("v1.0", "v1.1", "umt5")
V1_1 = TOY_CONFIGS["v1.1"]
MASK = padding_mask([5, 12, 1, 8], 12)
# Exact powers of two, a different one for each place.
SCALES = StackScales(
    tuple(LayerScales(2.0**-index, 2.0 ** -(index + 1), 0.25 if index else 0.5) for index in range(3)), 0.5
)


def ids_for(config: T5Config) -> Tensor:
    return torch.randint(2, config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def reference(config: T5Config, *loras: tuple[Lora, float], dtype: torch.dtype = torch.float32) -> Tensor:
    """transformers' hidden states with LoRAs added to its weights."""
    pytest.importorskip("transformers", reason="transformers is the oracle")
    model = transformers_encoder(config.encoder_only(), encoder_part(with_loras(random_state(config), *loras)), dtype)
    out: Tensor = model(ids_for(config), MASK)[0]
    return out


@torch.no_grad()
def ours(stack: T5EncoderStack) -> Tensor:
    out: Tensor = stack(ids_for(stack.config), MASK)
    return out


def assert_near(values: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert (values.double() - expected.double()).abs().max() <= relative * expected.abs().max()


def scaled_stack(config: T5Config, dtype: torch.dtype, layout: Layout) -> T5EncoderStack:
    """An encoder with float16 scales at every place."""
    config = config.encoder_only()
    recipes = (fused_recipes if layout == "fused" else separate_recipes)(config, SCALES)
    stack = T5EncoderStack(config, layout, NoInit, SCALES, device="meta", dtype=dtype)
    read = random_state(config).__getitem__
    stack.load_state_dict({recipe.target: cook(recipe, read, dtype) for recipe in recipes}, assign=True)
    return stack.eval()


def v1_1_stack(layout: Layout = "fused", dtype: torch.dtype = torch.float32) -> T5EncoderStack:
    return build_stack(V1_1, random_state(V1_1), dtype, layout)


def assert_same_weights(stack: T5EncoderStack, expected: dict[str, Tensor]) -> None:
    state = stack.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


def snapshot(stack: T5EncoderStack) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stack.state_dict().items()}
