"""What tests of the kernels for CUDA share: where they run, toys, and how errors are measured."""

from __future__ import annotations

import torch
from conftest import build_stack, random_state
from torch import Tensor

from nai_t5_core.backends.cuda.card import card_of
from nai_t5_core.backends.cuda.device_refusals import missing_to_overlap
from nai_t5_core.backends.cuda.encoder import PRODUCTS_CHOICES
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import StackScales
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.layers import NoInit
from nai_t5_core.weights.fuse import cook, fused_recipes

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"

# One rounding, relative to all numbers together; the interpreter cuts bfloat16 off where a GPU rounds.
ONE_ROUNDING = {torch.float16: 3e-4, torch.bfloat16: 2.4e-3 if HAS_GPU else 4.8e-3}
DTYPES = tuple(ONE_ROUNDING)
# The interpreter multiplies the bits of bfloat16 as if they were numbers.
PRODUCT_DTYPES = DTYPES if HAS_GPU else (torch.float16,)
CARD = card_of(torch.device("cuda"))
CAN_OVERLAP = CARD is not None and CARD.can_overlap and not missing_to_overlap()
# The products that can be computed here.
HERE = [choice for choice in PRODUCTS_CHOICES if CAN_OVERLAP or choice != "triton-overlapping"]


def error(found: Tensor, exact: Tensor) -> float:
    """Of all numbers together, relative to them; for zeros only zeros are right."""
    difference = float((found.cpu().double() - exact.cpu()).norm())
    return difference and difference / float(exact.double().norm())


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def stack_of(
    config: T5Config, dtype: torch.dtype = torch.float16, scales: StackScales | None = None, device: str = DEVICE
) -> T5EncoderStack:
    config = config.encoder_only()
    state = random_state(config)
    if scales is None:
        return build_stack(config, state, dtype).to(device)
    stack = T5EncoderStack(config, "fused", NoInit, scales, device="meta", dtype=dtype)
    recipes = fused_recipes(config, scales)
    stack.load_state_dict({recipe.target: cook(recipe, state.__getitem__, dtype) for recipe in recipes}, assign=True)
    return stack.to(device)


def exact_of(config: T5Config) -> T5EncoderStack:
    return stack_of(config, torch.float64, device="cpu")
