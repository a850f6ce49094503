"""The products of a layer by torch, which is cuBLAS on CUDA, and the interface that other products share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from nai_t5_core.backends.cuda.launches import gate
from nai_t5_core.facts.config import Activation

# What lets cuBLAS round sums of parts to the dtype of the result, or sum in it altogether.
_ROUNDED_SUMS = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


class Products(Protocol):
    """How products are computed; x is [tokens, in_features], a weight [out_features, in_features] in its dtype.

    Where launches overlap, each starts when all programs of the one before it are at work, and waits for the end of
    that by itself. So do the kernels between products then.
    """

    overlaps: bool

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        """x · weightᵀ, [tokens, out_features] in the dtype of x."""
        ...

    def activated(self, x: Tensor, weight: Tensor, activation: Activation, is_gated: bool) -> Tensor:
        """act(x · weightᵀ), or act(gate) · up where the weight is both, gate above up: [tokens, d_ff]."""
        ...

    def summed(self, x: Tensor, weight: Tensor) -> Tensor:
        """x · weightᵀ for a sum in float32: [tokens, out_features], or parts of it, [parts, tokens, out_features]."""
        ...


class TorchProducts:
    """Every product rounded to the compute dtype."""

    overlaps = False

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(x, weight.t())

    def activated(self, x: Tensor, weight: Tensor, activation: Activation, is_gated: bool) -> Tensor:
        return gate(torch.mm(x, weight.t()), activation, is_gated, self.overlaps)

    def summed(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(x, weight.t())


class UnroundedTorchProducts(TorchProducts):
    """What is added to the residual comes in float32: nothing is rounded there, and nothing overflows."""

    def summed(self, x: Tensor, weight: Tensor) -> Tensor:
        if not x.is_cuda:
            # The product with a dtype of its own exists on CUDA alone.
            return torch.mm(x.float(), weight.float().t())
        return torch.mm(x, weight.t(), out_dtype=torch.float32)


@contextmanager
def sums_in_float32() -> Iterator[None]:
    """Has cuBLAS sum in float32 in this scope, whatever the process has set; it is set back afterwards."""
    settings = torch.backends.cuda.matmul
    before = {name: value for name in _ROUNDED_SUMS if (value := _setting(name)) is not None}
    try:
        for name, value in before.items():
            # Sums may still be taken in parts.
            setattr(settings, name, (False, value[1]) if isinstance(value, tuple) else False)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def _setting(name: str) -> bool | tuple[bool, bool] | None:
    """A setting as it is set: with that of sums in parts where torch has one; None where torch lacks it."""
    settings = torch.backends.cuda.matmul
    try:
        value = getattr(settings, name)
    except (AttributeError, AssertionError):
        return None
    try:
        return value, getattr(settings, f"{name}_split_k")
    except (AttributeError, AssertionError):
        return bool(value)
