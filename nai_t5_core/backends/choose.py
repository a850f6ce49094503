"""Which backend computes a model: the automatic choice, and the functions that bind the chosen backend.

A backend that the caller names is used wherever it can compute the model, even if the automatic choice prefers another.
Where it cannot, that is an error that says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from nai_t5_core.backends.choices import ProductsChoice, impossible, missing_for_int8, refuse_products
from nai_t5_core.backends.cuda.byte_weight import kinds_of, lay_out_all
from nai_t5_core.backends.cuda.card import card_of
from nai_t5_core.backends.cuda.card_choice import choice_for
from nai_t5_core.backends.cuda.int8 import quantise_stack
from nai_t5_core.backends.cuda.refusals import refuses_for_good
from nai_t5_core.backends.cuda.runner import CudaRunner
from nai_t5_core.backends.kernels.build import (
    better_than_kernels,
    missing_for,
    prepare_kernels,
    tell_that_no_compiler_is_there,
    why_not_kernels,
)
from nai_t5_core.backends.kernels.compilers import NO_COMPILER
from nai_t5_core.backends.kernels.runners import INT8_KERNELS, KERNELS, KernelsBackend, KernelsInPlace, best
from nai_t5_core.backends.kernels.sets import named
from nai_t5_core.backends.products import INT8_ONEDNN, ONEDNN, Int8Backend, OneDNNBackend
from nai_t5_core.backends.quantised.kernels import refuses, runner_of_quantised
from nai_t5_core.backends.quantised.projections import stays_quantised
from nai_t5_core.model.attention_choice import FLEX_FROM_LENGTHS
from nai_t5_core.model.block import Backend
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.offloading import refuse_offloaded
from nai_t5_core.model.t5 import T5Model

Model = TypeVar("Model", bound=T5EncoderStack | T5Model)

_QUANTISED = "its weights stay as they lie in a quantised file; load it with unpack=True"


def run_in_place(model: Model, products: ProductsChoice = "auto") -> Model:
    """Makes our CPU kernels compute an encoder's blocks on the model's own parameters, wherever they can.

    The model may still be moved, cast, trained and changed. Where the kernels cannot compute a block, or are not
    preferred on this processor, its modules do. No kernel is compiled before the first call.

    Args:
        products: ``"auto"``, or the name of an instruction set.

    Returns:
        The same model.

    Raises:
        ValueError: ``products`` is neither, or this machine cannot compute by that set.
    """
    instructions = None
    if products != "auto":
        if products not in KERNELS:
            raise ValueError(f"unknown products {products!r} in place; allowed: auto, {', '.join(KERNELS)}")
        instructions = named(products)
        if obstacle := missing_for(instructions):
            raise ValueError(impossible(products, obstacle))
    block: Any
    for block in model.encoder.block:
        is_free = block.runner is None and (instructions is not None or why_not_kernels() is None)
        # A loaded model has the automatic choice, which a set that is named replaces.
        if is_free or (instructions is not None and isinstance(block.runner, KernelsInPlace)):
            block.runner = KernelsInPlace(instructions)
    return model


def run_quantised(stack: T5EncoderStack, products: ProductsChoice) -> T5EncoderStack:
    """Makes the kernels that are named compute the blocks of an encoder that stays quantised, from the same bytes.

    Args:
        products: see :func:`prepack`.

    Returns:
        The same stack.

    Raises:
        ValueError: unknown products, oneDNN, or kernels that cannot compute this model; or its layers are offloaded.
    """
    refuse_offloaded(stack, "given other products")
    refuse_products(products, stack.device)
    blocks: Any = stack.encoder.block
    if products == "auto":
        return stack
    if products == "onednn":
        raise ValueError(f"products={products!r} is not possible: {_QUANTISED}, or leave products at 'auto'")
    instructions = named(products) if products in KERNELS else best(KERNELS).instructions
    obstacle = KERNELS[instructions.name].missing(stack.device, stack.dtype) or prepare_kernels(instructions)
    obstacle = obstacle or next(filter(None, (refuses(block, stack.dtype, instructions) for block in blocks)), None)
    if obstacle:
        raise ValueError(f"products={products!r} is not possible: {obstacle}; leave products at 'auto'")
    for block in blocks:
        block.runner = runner_of_quantised(block, instructions)
    return stack


def encode_on_cuda(stack: T5EncoderStack) -> T5EncoderStack:
    """Makes our kernels for CUDA encode what they can of a stack that is on a GPU, and of no other.

    They read the stack's own parameters, which may still be changed; see :mod:`nai_t5_core.backends.cuda`. To be called
    again when the stack was moved.

    Returns:
        The same stack.
    """
    if stack.offload is not None:  # which chooses by itself
        return stack
    by_kernels = isinstance(stack.runner, CudaRunner)
    if (card := card_of(stack.device)) is not None:
        stack.flex_from_lengths = choice_for(card).flex_from_lengths
    if stack.device.type != "cuda" or refuses_for_good(stack) is not None:
        stack.runner = None if by_kernels else stack.runner
    elif stack.runner is None:
        lay_out_all(stack)
        stack.runner = CudaRunner(kinds=kinds_of(stack))
    return stack


def why_not_prepack(model: T5EncoderStack | T5Model) -> str | None:
    """Why this model's weights cannot be prepacked on this machine, as a sentence; None if they can.

    Where our kernels alone could compute it, they are compiled to find out.
    """
    if stays_quantised(model):
        return _QUANTISED
    reason = ONEDNN.missing(model.device, model.dtype)
    if reason is None or isinstance(model, T5Model) or better_than_kernels():
        return reason
    return (_obstacle(model, best(KERNELS)) or prepare_kernels()) and reason


def prepack(model: Model, products: ProductsChoice = "auto") -> Model:
    """Prepacks the weight of every projection for fast inference on this CPU. Each original is freed after its copy.

    Args:
        products: ``"auto"`` computes the encoder's blocks by our CPU kernels where they can and are faster (see
            :mod:`nai_t5_core.backends.kernels`), and all other products by oneDNN; ``"kernels"`` uses the kernels
            for the best instruction set that the processor has, and is an error where there is none; ``"amx"``,
            ``"avx512"``, ``"avx2-vnni"`` and ``"avx2"`` name a set, and AMX is used only where it is named;
            ``"onednn"`` uses oneDNN alone. On AVX2 a model in bfloat16 or float16 keeps its weights as they are, and
            is computed in float32.

    Returns:
        The same model, changed. It can no longer be moved, cast or trained. A tied head gets a prepacked copy, since
        the embedding table stays as it was.

    Raises:
        ValueError: the model is not on the CPU, in a dtype that neither the kernels nor oneDNN compute on this
            processor (a decoder needs oneDNN), stays as it lies in a quantised file, or has its layers offloaded; or
            what was asked for cannot compute it.
    """
    refuse_offloaded(model, "prepacked")
    if stays_quantised(model):
        raise ValueError(f"cannot prepack this model: {_QUANTISED}")
    kernels = _kernels_for(model, products, KERNELS)
    if kernels is None or isinstance(model, T5Model):
        _refuse_without_onednn(model)
    _bind(model, kernels or ONEDNN, ONEDNN)
    return model


def _refuse_without_onednn(model: T5EncoderStack | T5Model) -> None:
    if reason := ONEDNN.missing(model.device, model.dtype):
        raise ValueError(f"cannot prepack a model in {model.dtype} on {model.device}: {reason}")


def why_not_int8(model: T5EncoderStack | T5Model) -> str | None:
    """Why this model cannot be computed in 8 bits on this machine, as a sentence; None if it can."""
    if isinstance(model, T5Model):
        return INT8_ONEDNN.missing(model.device, model.dtype)
    if model.device.type == "cuda":
        return missing_for_int8(model.device, model.dtype)
    reason = INT8_ONEDNN.missing(model.device, model.dtype)
    obstacle = None if reason is None else _obstacle(model, best(INT8_KERNELS))
    return (obstacle and reason) or missing_for_int8(model.device, model.dtype)


def quantize_int8(model: Model, products: ProductsChoice = "auto", device: torch.device | None = None) -> Model:
    """Weights and activations in 8 bits on the CPU: about twice the speed of bfloat16's products, for some accuracy.

    Weights are quantised once with a scale per output channel, activations in every call with a scale per token; sums
    are exact in int32. Embeddings, norms, attention and the residual stay as they are; the output head of a whole T5 is
    quantised too. ``nai-t5 parity --int8`` prints the loss of accuracy. Each original weight is freed after its copy.

    On CUDA an encoder's weights become 8 bits in the same way, which halves its memory, and activations do for as many
    tokens as that was measured to be faster for, see :mod:`nai_t5_core.backends.cuda`; it may still be moved.

    Args:
        products: see :func:`prepack`.
        device: where the model is to be, by default where it is. An encoder on the CPU goes to CUDA weight by weight,
            so that the card never has more than the weights in 8 bits and a part of one as it was; if it has too
            little room, the encoder stays what it is.

    Returns:
        The same model, changed. It can no longer be trained, or on the CPU moved or cast.

    Raises:
        ValueError: on the CPU, the model is not in float32 or bfloat16, or this processor has no fast products of bytes
            (AVX512-VNNI or AMX for a decoder and for oneDNN, AVX2 for an encoder by our kernels); on CUDA, it is not in
            float16 or bfloat16, or has a decoder; its layers are offloaded; or what was asked for cannot compute it.
    """
    refuse_offloaded(model, "quantised")
    place = model.device if device is None else device
    if place.type == "cuda":
        return _quantize_on_cuda(model, products, place)
    kernels = _kernels_for(model, products, INT8_KERNELS)
    if kernels is None or isinstance(model, T5Model):
        _refuse_int8_without_onednn(model)
    _bind(model, kernels or INT8_ONEDNN, INT8_ONEDNN)
    return model


def _quantize_on_cuda(model: Model, products: ProductsChoice, device: torch.device) -> Model:
    refuse_products(products, device)
    if isinstance(model, T5Model):
        raise ValueError("8 bits on CUDA are for encoders; a T5 with its decoder stays in float16 or bfloat16 there")
    if reason := missing_for_int8(device, model.dtype):
        raise ValueError(f"cannot quantise a model in {model.dtype} on {device} to int8: {reason}")
    quantise_stack(model, device)
    return model


def _refuse_int8_without_onednn(model: T5EncoderStack | T5Model) -> None:
    if reason := INT8_ONEDNN.missing(model.device, model.dtype):
        raise ValueError(f"cannot quantise a model in {model.dtype} on {model.device} to int8: {reason}")


def automatic_attention() -> dict[str, str]:
    """Which attention ``attention="auto"`` chooses, in words, by device and batch."""
    return {
        "cpu": "sdpa" if why_not_kernels() else "kernels in bfloat16 and float32, else sdpa",
        "cuda": "sdpa",
        f"cuda, {FLEX_FROM_LENGTHS} lengths and more": "flex in bfloat16 and float16",
    }


def _kernels_for(
    model: T5EncoderStack | T5Model, products: ProductsChoice, kernels: Mapping[str, KernelsBackend]
) -> KernelsBackend | None:
    """The kernels that are to compute the encoder's blocks, which are compiled now; None: oneDNN.

    Raises:
        ValueError: unknown products, or the kernels were asked for and cannot compute this model.
    """
    refuse_products(products, model.device)
    if products == "onednn" or (products == "auto" and better_than_kernels()):
        return None
    if products in kernels:
        obstacle = _obstacle(model, kernels[products]) or prepare_kernels(named(products))
        found = kernels[products]
    else:
        # Where the best set cannot be built, the next best may be.
        obstacle = _obstacle(model, best(kernels)) or prepare_kernels()
        found = best(kernels)
    if obstacle and products != "auto":
        raise ValueError(impossible(products, obstacle))
    if obstacle == NO_COMPILER:
        tell_that_no_compiler_is_there()
    return None if obstacle else found


def _obstacle(model: T5EncoderStack | T5Model, kernels: KernelsBackend) -> str | None:
    """Why these kernels cannot compute the encoder, as far as is known before they are built."""
    blocks: Any = model.encoder.block
    missing = kernels.missing(model.device, model.dtype)
    return missing or next(filter(None, (kernels.refuses(block, model.dtype) for block in blocks)), None)


def _bind(model: T5EncoderStack | T5Model, backend: Backend, without_kernels: OneDNNBackend | Int8Backend) -> None:
    """Binds every block, and by oneDNN the head; calls of other threads that run are waited for."""
    block: Any
    with model.turns.change():
        for block in model.encoder.block:
            backend.bind(block, model.dtype)
        if isinstance(model, T5Model):
            # A step that torch compiles sees through oneDNN's products, and not through the kernels.
            for_decoder = backend if model.compiled_steps is None else without_kernels
            for block in model.decoder.block:
                (without_kernels if for_decoder.refuses(block, model.dtype) else for_decoder).bind(block, model.dtype)
            model.lm_head = without_kernels.held(model.lm_head, model.dtype)
