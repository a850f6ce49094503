"""What a caller may choose of what computes a model, and refusing it before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch

from nai_t5_core.backends.cuda.device_refusals import missing_for_8_bits
from nai_t5_core.backends.kernels.build import better_than_kernels, prepare_kernels
from nai_t5_core.backends.kernels.runners import INT8_KERNELS, KERNELS, KernelsBackend, best
from nai_t5_core.backends.kernels.sets import InstructionSet
from nai_t5_core.backends.products import INT8_ONEDNN, ONEDNN, Int8Backend, OneDNNBackend

# The names after "kernels" are those of instruction sets.
ProductsChoice = Literal["auto", "kernels", "amx", "avx512", "avx2-vnni", "avx2", "onednn"]
PRODUCTS_CHOICES: tuple[ProductsChoice, ...] = get_args(ProductsChoice)

# The ways to quantise a model while it is loaded.
Quantisation = Literal["int8"]


def refuse_products(products: str, device: torch.device, stays_plain: bool = False) -> None:
    """Refuses unknown products, and any but ``"auto"`` for a model that no backend is to hold.

    Raises:
        ValueError: unknown products; or some are named for another device than the CPU or a model that ``stays_plain``.
    """
    if products not in PRODUCTS_CHOICES:
        raise ValueError(f"unknown products {products!r}; allowed: {', '.join(PRODUCTS_CHOICES)}")
    if products != "auto" and (stays_plain or device.type != "cpu"):
        raise ValueError(
            f"products={products!r} is for models that are prepacked or quantised on the CPU, and not compiled; this "
            f"one is to be on {device}; leave products at 'auto'"
        )


def backend_of(
    products: ProductsChoice, quantize: Quantisation | None = None
) -> KernelsBackend | OneDNNBackend | Int8Backend:
    """What computes an encoder by products that are named."""
    if products == "onednn":
        return INT8_ONEDNN if quantize else ONEDNN
    kernels: Mapping[str, KernelsBackend] = INT8_KERNELS if quantize else KERNELS
    return kernels[products] if products in kernels else best(kernels)


def set_of(products: str) -> InstructionSet | None:
    """The set that a choice of products names, ``"kernels"`` the best of this machine; None: it names none."""
    if products == "kernels":
        return best(KERNELS).instructions
    return KERNELS[products].instructions if products in KERNELS else None


def refuse_missing(
    products: ProductsChoice, device: torch.device, dtype: torch.dtype, quantize: Quantisation | None = None
) -> None:
    """As :func:`refuse_products`, and refuses those that this machine cannot have, as far as is known unbuilt.

    Raises:
        ValueError: what is missing, and what to name in their place.
    """
    refuse_products(products, device)
    if products != "auto" and (missing := backend_of(products, quantize).missing(device, dtype)):
        raise ValueError(impossible(products, missing))


def impossible(products: str, obstacle: str) -> str:
    """What is told of products that are named and cannot compute a model."""
    others = "'auto'" if products == "onednn" else "'auto' or 'onednn'"
    return f"products={products!r} is not possible: {obstacle}; use products={others}"


def refuse_quantising(quantize: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses a quantisation that no encoder can have in this dtype on this device; None is always possible.

    Raises:
        ValueError: an unknown quantisation, or one that is not possible here.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r}; allowed: None, 'int8'")
    if quantize and (reason := missing_for_int8(device, dtype)):
        raise ValueError(f"cannot quantise a model in {dtype} on {device} to int8: {reason}")


def missing_for_int8(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no encoder in this dtype can be computed in 8 bits on this device, as a sentence; None if it can."""
    if device.type == "cuda":
        return missing_for_8_bits(device, dtype)
    reason = INT8_ONEDNN.missing(device, dtype)
    if reason is None or better_than_kernels():
        return reason
    return (best(INT8_KERNELS).missing(device, dtype) or prepare_kernels()) and reason


def refuse_both(quantize: Quantisation | None, offload: bool) -> None:
    """Raises a ValueError where weights that are to be offloaded are to be quantised as well."""
    if quantize is not None and offload:
        raise ValueError(
            f"quantize={quantize!r} and offload=True exclude each other; leave one out. A file in 8 bits (GGUF Q8_0, "
            "float8, int8) is offloaded as it lies"
        )
