"""What will compute an encoder that is yet to be loaded, in words."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nai_t5_core.backends.choices import ProductsChoice, Quantisation, set_of
from nai_t5_core.backends.cuda.card import card_of
from nai_t5_core.backends.cuda.card_choice import choice_for
from nai_t5_core.backends.kernels.build import better_than_kernels, set_to_use
from nai_t5_core.backends.kernels.runners import (
    INT8_KERNELS,
    KERNELS,
    KernelsBackend,
    best,
    refuses_mathematics,
)
from nai_t5_core.backends.products import ONEDNN
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import StackScales, unscaled
from nai_t5_core.model.attention_choice import FLEX_FROM_LENGTHS, AttentionChoice
from nai_t5_core.model.encoder import Layout
from nai_t5_core.model.encoder_block import EncoderBlock
from nai_t5_core.model.layers import NoInit


def forecast(
    config: T5Config,
    device: torch.device,
    dtype: torch.dtype,
    layout: Layout = "fused",
    scales: StackScales | None = None,
    optimize: bool = True,
    quantize: Quantisation | None = None,
    compile: bool | str = False,  # noqa: A002
    attention: AttentionChoice = "auto",
    products: ProductsChoice = "auto",
) -> str:
    """What computes an encoder that is loaded with these arguments of ``TextEncoder.from_pretrained``.

    Two that give the same words round in the same places; a batch may still be rounded otherwise than its prompts one
    by one. Nothing is compiled or loaded to find out.
    """
    words = device.type
    if device.type == "cpu":
        words = f"cpu, {_on_cpu(config, dtype, layout, scales, optimize, quantize, compile, products)}"
    elif device.type == "cuda" and quantize:
        words = f"{words}, int8 weights"
    if compile:
        words = f"{words}, compiled" if compile is True else f"{words}, compiled for {compile}"
    elif device.type == "cuda" and optimize and attention == "auto":
        words = f"{words}, {on_cuda(device, quantize is not None)}"
    return words if attention == "auto" else f"{words}, attention {attention}"


def on_cuda(device: torch.device, in_8_bits: bool = False) -> str:
    """The kernels, with what decides which products they round, and from where on torch's attention is flex.

    Args:
        in_8_bits: whether ``quantize="int8"`` makes the weights.
    """
    card = card_of(device)
    if card is None:
        return "kernels where they can"
    choice = choice_for(card)
    if choice.unproven:
        return "torch"
    lengths = choice.flex_from_lengths
    flex = "" if lengths == FLEX_FROM_LENGTHS else f", flex from {lengths} lengths"
    rows = choice.int8_inputs_from if in_8_bits else None
    inputs = "" if rows is None else f", inputs in 8 bits from {rows} tokens"
    return f"kernels where they can, products {choice.rounding}{inputs}{flex}"


def blocks_of(config: T5Config, dtype: torch.dtype, layout: Layout, scales: StackScales | None) -> list[EncoderBlock]:
    """One of every sort, without weights."""
    chosen = scales or unscaled(config.num_layers)
    make = EncoderBlock.fused if layout == "fused" else EncoderBlock.separate
    return [make(config, False, layer, NoInit, device="meta", dtype=dtype) for layer in set(chosen.layers)]


def _on_cpu(
    config: T5Config,
    dtype: torch.dtype,
    layout: Layout,
    scales: StackScales | None,
    optimize: bool,
    quantize: Quantisation | None,
    compile: bool | str,  # noqa: A002
    products: ProductsChoice,
) -> str:
    blocks = blocks_of(config, dtype, layout, scales)
    if quantize:
        return _kernels(INT8_KERNELS, blocks, dtype, products) or "8 bits by oneDNN"
    if optimize and not compile:
        held = _kernels(KERNELS, blocks, dtype, products)
        if held or ONEDNN.missing(torch.device("cpu"), dtype) is None:
            return held or "oneDNN"
    return "torch" if compile else in_place(config, dtype, layout, scales, products)


def in_place(
    config: T5Config,
    dtype: torch.dtype,
    layout: Layout,
    scales: StackScales | None,
    products: ProductsChoice = "auto",
) -> str:
    """What computes blocks whose weights nobody holds: the kernels, or torch; or each what it can."""
    instructions = set_to_use(set_of(products))
    has_form = layout == "fused" and config.d_model % 2 == config.d_ff % 2 == 0
    if instructions is None or not has_form or dtype not in instructions.stored:
        return "torch"
    refused = [refuses_mathematics(block) is not None for block in blocks_of(config, dtype, layout, scales)]
    if all(refused):
        return "torch"
    name = KERNELS[instructions.name].name
    return f"{name} where they can" if any(refused) else name


def _kernels(
    kernels: Mapping[str, KernelsBackend], blocks: list[EncoderBlock], dtype: torch.dtype, products: ProductsChoice
) -> str | None:
    """The kernels that are taken, unless they turn out not to compile here; None if others are."""
    if products == "onednn" or (products == "auto" and better_than_kernels()):
        return None
    found = kernels[products] if products in kernels else best(kernels)
    missing = found.missing(torch.device("cpu"), dtype)
    return None if missing or any(found.refuses(block, dtype) for block in blocks) else found.name
