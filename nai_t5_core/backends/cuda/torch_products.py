"""The products of a layer by torch (cuBLAS on CUDA), and the interface of all implementations of products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from nai_t5_core.backends.cuda.activations import Bytes, Sums
from nai_t5_core.backends.cuda.byte_weight import RowScaled
from nai_t5_core.backends.cuda.launches import gate
from nai_t5_core.facts.config import Activation

# Settings that let cuBLAS round partial sums to the dtype of the result, or compute whole sums in it.
_ROUNDED_SUMS = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


class Products(Protocol):
    """How products are computed; x is [tokens, in_features], a weight [out_features, in_features] in the dtype of x.

    Some take weights in 8 bits as well (:class:`nai_t5_core.backends.cuda.byte_weight.ByteWeight`), and x in 8 bits
    where :meth:`input_bytes` says so.
    """

    def overlaps(self, rows: int, in_bytes: bool, inputs_in_bytes: bool = False) -> bool:
        """Whether launches overlap in a layer of so many rows, those of products and of the kernels between them.

        Each starts when the programs of the one before have their sums, or, of the kernels between, when they have
        begun, and waits for its end in the kernel (programmatic dependent launch).

        Args:
            in_bytes: whether the layer's weights are in 8 bits.
            inputs_in_bytes: whether its activations are, see :meth:`input_bytes`.
        """
        ...

    def input_bytes(self, weights: RowScaled | None, rows: int) -> torch.dtype | None:
        """The dtype of 8 bits that a layer's activations of so many rows are to be in; None: the compute dtype.

        Args:
            weights: of the whole layer, if nothing but scales of columns multiplies them; else None.
        """
        ...

    def plain(self, x: Any, weight: Any) -> Tensor:
        """x · weightᵀ, [tokens, out_features] in the dtype of x."""
        ...

    def activated(self, x: Any, weight: Any, activation: Activation, is_gated: bool) -> Tensor | Bytes:
        """act(x · weightᵀ), or act(gate) · up where the weight has gate above up: [tokens, d_ff], in bytes as x is."""
        ...

    def summed(self, x: Any, weight: Any) -> Tensor | Sums:
        """x · weightᵀ, to add in float32: [tokens, out_features], or partial sums [parts, tokens, out_features]."""
        ...


class TorchProducts:
    """Products by torch, each rounded to the compute dtype."""

    def overlaps(self, rows: int, in_bytes: bool, inputs_in_bytes: bool = False) -> bool:
        return False

    def input_bytes(self, weights: RowScaled | None, rows: int) -> torch.dtype | None:
        return None

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(x, weight.t())

    def activated(self, x: Tensor, weight: Tensor, activation: Activation, is_gated: bool) -> Tensor:
        return gate(torch.mm(x, weight.t()), activation, is_gated, self.overlaps(len(x), False))

    def summed(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(x, weight.t())


class UnroundedTorchProducts(TorchProducts):
    """As :class:`TorchProducts`, but ``summed`` gives float32: it neither rounds nor overflows."""

    def summed(self, x: Tensor, weight: Tensor) -> Tensor:
        if not x.is_cuda:
            # ``out_dtype`` exists on CUDA only.
            return torch.mm(x.float(), weight.float().t())
        return torch.mm(x, weight.t(), out_dtype=torch.float32)


@contextmanager
def sums_in_float32() -> Iterator[None]:
    """Makes cuBLAS sum in float32 within this context; afterwards the settings are what they were."""
    settings = torch.backends.cuda.matmul
    before = {name: value for name in _ROUNDED_SUMS if (value := _setting(name)) is not None}
    try:
        for name, value in before.items():
            # Partial sums (split-k) stay allowed.
            setattr(settings, name, (False, value[1]) if isinstance(value, tuple) else False)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def _setting(name: str) -> bool | tuple[bool, bool] | None:
    """A setting's value, as a pair with its split-k setting where torch has one; None where torch lacks the setting."""
    settings = torch.backends.cuda.matmul
    try:
        value = getattr(settings, name)
    except (AttributeError, AssertionError):
        return None
    try:
        return value, getattr(settings, f"{name}_split_k")
    except (AttributeError, AssertionError):
        return bool(value)
