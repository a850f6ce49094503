"""What computes the drop-in class on a CPU: the set of instructions, or oneDNN, that a caller names.

Kernels that are named compute in place, from the model's own parameters, so that it may still be moved, cast and saved.
"""

from __future__ import annotations

from typing import Any

import torch

from nai_t5_core.backends.choices import (
    Quantisation,
    backend_of,
    impossible,
    refuse_both,
    refuse_missing,
    refuse_products,
    refuse_quantising,
    set_of,
)
from nai_t5_core.backends.choose import prepack, quantize_int8, run_in_place, run_quantised
from nai_t5_core.backends.forecast import blocks_of
from nai_t5_core.backends.kernels.build import prepare_kernels
from nai_t5_core.backends.quantised.pieces import is_read
from nai_t5_core.backends.quantised.projections import stays_quantised
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.prompts.choices import Choices
from nai_t5_core.weights.chosen import told_scales
from nai_t5_core.weights.examine import Examination


def refuse_impossible(how: Choices, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses what no encoder can have in this dtype on this device. Nothing is read or compiled.

    Raises:
        ValueError: an unknown choice, one that is not possible here, or two that exclude each other.
    """
    refuse_products(how.products, device)
    refuse_both(how.quantize, how.offload)
    if how.products != "auto" and how.offload:
        raise ValueError(
            f"products={how.products!r} and offload=True exclude each other: leave products at 'auto', or offload out"
        )
    refuse_to_quantise(how.quantize, device, dtype)
    refuse_missing(how.products, device, dtype, how.quantize)


def refuse_to_quantise(quantize: Quantisation | None, device: torch.device, dtype: torch.dtype) -> None:
    """As :func:`nai_t5_core.backends.choices.refuse_quantising`, and on every GPU of CUDA's.

    One that is quantised there could be moved to the CPU, and would then compute otherwise than one that is quantised
    on the CPU, under the same key of kept embeddings.
    """
    if quantize == "int8" and device.type == "cuda":
        raise ValueError(
            f"quantize={quantize!r} is for models of diffusers on the CPU, and this one is to be on {device}: give a "
            "file in 8 bits (nai-t5 convert … --quantize int8, or GGUF Q8_0), whose weights stay so, or leave it out"
        )
    refuse_quantising(quantize, device, dtype)


def refuse_products_for(examination: Examination, how: Choices, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses products that are named and cannot compute this encoder, whose weights are still where they were.

    Kernels that are named are compiled for this.

    Raises:
        ValueError: what is in their way, and what to do.
    """
    if how.products == "auto":
        return
    refuse_missing(how.products, device, dtype, how.quantize)
    stays = bool(examination.quantised) and not (how.unpack or how.quantize)
    if stays and how.products == "onednn":
        raise ValueError(
            f"products={how.products!r} is not possible: the weights stay as they lie in a quantised file; load it "
            "with unpack=True, or leave products at 'auto'"
        )
    if obstacle := _obstacle(examination, how, dtype, stays):
        if stays:
            raise ValueError(f"products={how.products!r} is not possible: {obstacle}; leave products at 'auto'")
        raise ValueError(impossible(how.products, obstacle))


def _obstacle(examination: Examination, how: Choices, dtype: torch.dtype, stays: bool) -> str | None:
    instructions = set_of(how.products)
    if instructions is None:
        return None
    if how.layout == "separate" and not (stays or how.quantize):
        return "kernels compute in place from joined projections, which layout='separate' keeps apart"
    kinds = {stored.kind for name, stored in examination.quantised.items() if name.startswith("encoder.block.")}
    if stays and (unread := sorted(kind.name for kind in kinds if not is_read(kind))):
        return f"the kernels do not read {', '.join(unread)}"
    backend = backend_of(how.products, how.quantize)
    scales = told_scales(examination, dtype, how.scales)
    blocks = blocks_of(examination.config.encoder_only(), dtype, how.layout, scales)
    refused = next(filter(None, (backend.refuses(block, dtype) for block in blocks)), None)
    return refused or prepare_kernels(instructions)


def computed_as_chosen(stack: T5EncoderStack, how: Choices) -> T5EncoderStack:
    """The same stack, quantised where that was asked for, and computed by the products that were named."""
    if how.quantize:
        return quantize_int8(stack, how.products)
    if how.products == "auto":
        return stack
    if stays_quantised(stack):
        return run_quantised(stack, how.products)
    instructions: Any = set_of(how.products)
    return prepack(stack, "onednn") if instructions is None else run_in_place(stack, instructions.name)
