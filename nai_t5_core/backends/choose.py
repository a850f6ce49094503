"""Which backend computes a model: the one table of preferences, and the functions that follow it.

"Cannot" and "is not preferred" are two things: a backend that is named is taken wherever it can compute the model, and
is an error that says why not elsewhere.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args

import torch

from nai_t5_core.backends.cuda.refusals import refuses_for_good
from nai_t5_core.backends.cuda.runner import CudaRunner
from nai_t5_core.backends.held import HeldLinear
from nai_t5_core.backends.int8_weight import Int8Product, Int8Weight
from nai_t5_core.backends.kernels import INT8_KERNELS, KERNELS, KernelsInPlace
from nai_t5_core.backends.products import INT8_ONEDNN, ONEDNN
from nai_t5_core.kernels.build import better_than_kernels, prepare_kernels, why_not_kernels
from nai_t5_core.model.attention_choice import FLEX_FROM_LENGTHS
from nai_t5_core.model.block import Backend
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.t5 import T5Model

Model = TypeVar("Model", bound=T5EncoderStack | T5Model)

ProductsChoice = Literal["auto", "kernels", "onednn"]
PRODUCTS_CHOICES: tuple[ProductsChoice, ...] = get_args(ProductsChoice)

# How a model that is being loaded can be quantised.
Quantisation = Literal["int8"]


def run_in_place(model: Model) -> Model:
    """Has an encoder's blocks computed by what is fastest for weights that stay where they are, whenever that can.

    It takes nothing from the model, which may be moved, cast, trained and changed as ever: then, and wherever nothing
    is faster, blocks are computed module by module. Nothing is built before the first call.

    Returns:
        The same model.
    """
    block: Any
    for block in model.encoder.block:
        if block.runner is None and why_not_kernels() is None:
            block.runner = KernelsInPlace()
    return model


def encode_on_cuda(stack: T5EncoderStack) -> T5EncoderStack:
    """Has our kernels for CUDA encode what they can, see :mod:`nai_t5_core.backends.cuda`; elsewhere nothing changes.

    They take nothing from the stack, which may be changed as ever.

    Returns:
        The same stack.
    """
    if stack.device.type == "cuda" and refuses_for_good(stack) is None:
        stack.runner = CudaRunner()
    return stack


def why_not_prepack(model: T5EncoderStack | T5Model) -> str | None:
    """What is against prepacking this model's weights on this machine, as a sentence; None if nothing."""
    return ONEDNN.missing(model.device, model.dtype)


def prepack(model: Model, products: ProductsChoice = "auto") -> Model:
    """Has every projection prepacked for fast inference on this CPU; each original is let go when its copy is made.

    Args:
        products: ``"auto"`` has the blocks of the encoder computed by the kernels where these can do it and are faster
            (see :mod:`nai_t5_core.kernels`), and all else by oneDNN; ``"kernels"`` takes them wherever the processor
            has the instructions, and is an error elsewhere; ``"onednn"`` does without them.

    Returns:
        The same model, changed. It can no longer be moved, cast or trained. A tied head gets a copy of its own, since
        the embedding stays as it was.

    Raises:
        ValueError: the model is not on the CPU, or not in float32 or a bfloat16 that this processor's oneDNN supports;
            or the kernels were asked for and cannot compute it.
    """
    if reason := why_not_prepack(model):
        raise ValueError(f"cannot prepack a model in {model.dtype} on {model.device}: {reason}")
    _bind(model, KERNELS if _takes_kernels(model, products, KERNELS) else ONEDNN, ONEDNN)
    if isinstance(model, T5Model):
        model.lm_head = ONEDNN.held(model.lm_head, model.dtype)
    return model


def why_not_int8(model: T5EncoderStack | T5Model) -> str | None:
    """What is against computing this model in 8 bits on this machine, as a sentence; None if nothing."""
    return INT8_ONEDNN.missing(model.device, model.dtype)


def refuse_quantising(quantize: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses what cannot be done to a model in this dtype on this device; None asks for nothing.

    Raises:
        ValueError: an unknown quantisation, or one that is not possible here.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r}; allowed: None, 'int8'")
    if quantize and (reason := INT8_ONEDNN.missing(device, dtype)):
        raise ValueError(f"cannot quantise a model in {dtype} on {device} to int8: {reason}")


def quantize_int8(model: Model, products: ProductsChoice = "auto") -> Model:
    """Weights and activations in 8 bits on the CPU: about twice the speed of bfloat16's products, for some accuracy.

    Weights are quantised once with a scale per output channel, activations in every call with a scale per token; sums
    are exact in int32. Embeddings, norms, attention and the residual stay as they are; of a whole T5 the output head is
    quantised too. ``nai-t5 parity --int8`` prints what it costs. Each original is let go when its copy is made.

    Args:
        products: see :func:`prepack`.

    Returns:
        The same model, changed. It can no longer be moved, cast or trained.

    Raises:
        ValueError: the model is not on the CPU or not in float32 or bfloat16, or this processor has no fast products
            of bytes (AVX512-VNNI or AMX); or the kernels were asked for and cannot compute it.
    """
    refuse_quantising("int8", model.device, model.dtype)
    _bind(model, INT8_KERNELS if _takes_kernels(model, products, INT8_KERNELS) else INT8_ONEDNN, INT8_ONEDNN)
    if isinstance(model, T5Model):
        head = Int8Product(Int8Weight.of(model.lm_head.weight), model.dtype)
        model.lm_head = HeldLinear([head], dtype=model.dtype)
    return model


def automatic_attention() -> dict[str, str]:
    """What ``attention="auto"`` comes to, in words, by device and batch."""
    return {
        "cpu": "sdpa" if why_not_kernels() else "kernels in bfloat16 and float32, else sdpa",
        "cuda": "sdpa",
        f"cuda, {FLEX_FROM_LENGTHS} lengths and more": "flex in bfloat16 and float16",
    }


def _takes_kernels(model: T5EncoderStack | T5Model, products: ProductsChoice, kernels: Backend) -> bool:
    """Whether these kernels are to compute the encoder's blocks; they are built then.

    Raises:
        ValueError: unknown products, or the kernels were asked for and cannot compute this model.
    """
    if products not in PRODUCTS_CHOICES:
        raise ValueError(f"unknown products {products!r}; allowed: {', '.join(PRODUCTS_CHOICES)}")
    if products == "onednn" or (products == "auto" and better_than_kernels()):
        return False
    blocks: Any = model.encoder.block
    obstacle = kernels.missing(model.device, model.dtype)
    obstacle = obstacle or next(filter(None, (kernels.refuses(block, model.dtype) for block in blocks)), None)
    obstacle = obstacle or prepare_kernels()
    if obstacle and products == "kernels":
        raise ValueError(f"products='kernels' is not possible: {obstacle}; use products='auto' or 'onednn'")
    return obstacle is None


def _bind(model: T5EncoderStack | T5Model, backend: Backend, for_decoder: Backend) -> None:
    block: Any
    for block in model.encoder.block:
        backend.bind(block, model.dtype)
    for block in model.decoder.block if isinstance(model, T5Model) else ():
        for_decoder.bind(block, model.dtype)
