"""Which backend computes a model: the automatic choice, and the functions that bind the chosen backend.

A backend that the caller names is used wherever it can compute the model, even if the automatic choice prefers another.
Where it cannot, that is an error that says why.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args

import torch

from nai_t5_core.backends.cuda.refusals import refuses_for_good
from nai_t5_core.backends.cuda.runner import CudaRunner
from nai_t5_core.backends.held import HeldLinear
from nai_t5_core.backends.int8_weight import Int8Product, Int8Weight
from nai_t5_core.backends.kernels.build import better_than_kernels, prepare_kernels, why_not_kernels
from nai_t5_core.backends.kernels.runners import INT8_KERNELS, KERNELS, KernelsInPlace
from nai_t5_core.backends.products import INT8_ONEDNN, ONEDNN
from nai_t5_core.backends.quantised.projections import stays_quantised
from nai_t5_core.model.attention_choice import FLEX_FROM_LENGTHS
from nai_t5_core.model.block import Backend
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.t5 import T5Model

Model = TypeVar("Model", bound=T5EncoderStack | T5Model)

ProductsChoice = Literal["auto", "kernels", "onednn"]
PRODUCTS_CHOICES: tuple[ProductsChoice, ...] = get_args(ProductsChoice)

# The ways to quantise a model while it is loaded.
Quantisation = Literal["int8"]


def run_in_place(model: Model) -> Model:
    """Makes our CPU kernels compute an encoder's blocks on the model's own parameters, wherever they can.

    The model may still be moved, cast, trained and changed. Where the kernels cannot compute a block, or are not
    preferred on this processor, its modules do. No kernel is compiled before the first call.

    Returns:
        The same model.
    """
    block: Any
    for block in model.encoder.block:
        if block.runner is None and why_not_kernels() is None:
            block.runner = KernelsInPlace()
    return model


def encode_on_cuda(stack: T5EncoderStack) -> T5EncoderStack:
    """Makes our kernels for CUDA encode what they can, see :mod:`nai_t5_core.backends.cuda`; else nothing changes.

    They read the stack's own parameters, which may still be changed.

    Returns:
        The same stack.
    """
    if stack.device.type == "cuda" and refuses_for_good(stack) is None:
        stack.runner = CudaRunner()
    return stack


def why_not_prepack(model: T5EncoderStack | T5Model) -> str | None:
    """Why this model's weights cannot be prepacked on this machine, as a sentence; None if they can."""
    if stays_quantised(model):
        return "its weights stay as they lie in a quantised file; load it with unpack=True"
    return ONEDNN.missing(model.device, model.dtype)


def prepack(model: Model, products: ProductsChoice = "auto") -> Model:
    """Prepacks the weight of every projection for fast inference on this CPU. Each original is freed after its copy.

    Args:
        products: ``"auto"`` computes the encoder's blocks by our CPU kernels where they can and are faster (see
            :mod:`nai_t5_core.backends.kernels`), and all other products by oneDNN; ``"kernels"`` uses the kernels
            wherever the processor has the instructions, and is an error elsewhere; ``"onednn"`` uses oneDNN alone.

    Returns:
        The same model, changed. It can no longer be moved, cast or trained. A tied head gets a prepacked copy, since
        the embedding table stays as it was.

    Raises:
        ValueError: the model is not on the CPU, or not in float32 or a bfloat16 that this processor's oneDNN supports;
            its weights stay as they lie in a quantised file; or the kernels were asked for and cannot compute it.
    """
    if reason := why_not_prepack(model):
        raise ValueError(f"cannot prepack a model in {model.dtype} on {model.device}: {reason}")
    _bind(model, KERNELS if _takes_kernels(model, products, KERNELS) else ONEDNN, ONEDNN)
    if isinstance(model, T5Model):
        model.lm_head = ONEDNN.held(model.lm_head, model.dtype)
    return model


def why_not_int8(model: T5EncoderStack | T5Model) -> str | None:
    """Why this model cannot be computed in 8 bits on this machine, as a sentence; None if it can."""
    return INT8_ONEDNN.missing(model.device, model.dtype)


def refuse_quantising(quantize: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses a quantisation that is not possible for a model in this dtype on this device; None is always possible.

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
    are exact in int32. Embeddings, norms, attention and the residual stay as they are; the output head of a whole T5 is
    quantised too. ``nai-t5 parity --int8`` prints the loss of accuracy. Each original weight is freed after its copy.

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
    """Which attention ``attention="auto"`` chooses, in words, by device and batch."""
    return {
        "cpu": "sdpa" if why_not_kernels() else "kernels in bfloat16 and float32, else sdpa",
        "cuda": "sdpa",
        f"cuda, {FLEX_FROM_LENGTHS} lengths and more": "flex in bfloat16 and float16",
    }


def _takes_kernels(model: T5EncoderStack | T5Model, products: ProductsChoice, kernels: Backend) -> bool:
    """Whether these kernels are to compute the encoder's blocks; if so, they are compiled now.

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
