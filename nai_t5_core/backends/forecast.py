"""What will compute an encoder that is yet to be loaded, in words."""

from __future__ import annotations

import torch

from nai_t5_core.backends.choose import INT8_KERNELS, KERNELS, ONEDNN, Quantisation
from nai_t5_core.backends.kernels.build import better_than_kernels, why_not_kernels
from nai_t5_core.backends.kernels.calls import COMPUTE_DTYPES
from nai_t5_core.backends.kernels.runners import refuses_mathematics
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import StackScales, unscaled
from nai_t5_core.model.attention_choice import AttentionChoice
from nai_t5_core.model.block import Backend
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
) -> str:
    """What computes an encoder that is loaded with these arguments of ``TextEncoder.from_pretrained``.

    Two that give the same words round in the same places; a batch may still be rounded otherwise than its prompts one
    by one. Nothing is compiled or loaded to find out.
    """
    words = device.type if device.type != "cpu" else _on_cpu(config, dtype, layout, scales, optimize, quantize, compile)
    if compile:
        words = f"{words}, compiled"
    elif device.type == "cuda" and optimize and attention == "auto":
        words = f"{words}, kernels where they can"
    return words if attention == "auto" else f"{words}, attention {attention}"


def _on_cpu(
    config: T5Config,
    dtype: torch.dtype,
    layout: Layout,
    scales: StackScales | None,
    optimize: bool,
    quantize: Quantisation | None,
    compile: bool | str,  # noqa: A002
) -> str:
    chosen = scales or unscaled(config.num_layers)
    make = EncoderBlock.fused if layout == "fused" else EncoderBlock.separate
    blocks = [make(config, False, layer, NoInit, device="meta", dtype=dtype) for layer in set(chosen.layers)]
    if quantize:
        return "cpu, 8 bits by kernels" if _takes(INT8_KERNELS, blocks, dtype) else "cpu, 8 bits by oneDNN"
    if optimize and not compile and ONEDNN.missing(torch.device("cpu"), dtype) is None:
        return "cpu, kernels" if _takes(KERNELS, blocks, dtype) else "cpu, oneDNN"
    in_place = layout == "fused" and dtype in COMPUTE_DTYPES and config.d_model % 2 == config.d_ff % 2 == 0
    if compile or not in_place or why_not_kernels() or any(map(refuses_mathematics, blocks)):
        return "cpu, torch"
    return "cpu, kernels"


def _takes(kernels: Backend, blocks: list[EncoderBlock], dtype: torch.dtype) -> bool:
    """Whether an automatic choice takes these kernels, unless they turn out not to compile here."""
    missing = kernels.missing(torch.device("cpu"), dtype) or better_than_kernels()
    return missing is None and not any(kernels.refuses(block, dtype) for block in blocks)
