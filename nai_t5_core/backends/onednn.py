"""Products with weights in oneDNN's blocked order, so that no call has to reorder them."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from nai_t5_core.facts.config import Activation

# oneDNN's names for the operation that it applies to a product before rounding.
_POST_OPERATIONS: dict[str | None, tuple[str, list[Any], str]] = {
    None: ("none", [], ""),
    "relu": ("relu", [], ""),
    "gelu_new": ("gelu", [], "tanh"),
    "gelu": ("gelu", [], "none"),
    "silu": ("swish", [], ""),
}

# A compiled graph cannot hold weights in oneDNN's blocked order; it holds a product's number and finds it here.
_NUMBERS = itertools.count()
_BY_NUMBER: WeakValueDictionary[int, OneDNNProduct] = WeakValueDictionary()


class OneDNNProduct:
    """A product with a weight, which the second call puts in blocked order: a process that encodes once never pays.

    Args:
        weight: [out_features, in_features], float32, or bfloat16 where the processor supports it; on the CPU.
    """

    in_8_bits = False

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        # One tensor in place of another: threads that come here together find the same numbers in either.
        self._weight = weight.detach()
        self._called = False
        self._take_number()

    def __call__(self, x: Tensor, activation: Activation | None = None, factor: Tensor | None = None) -> Tensor:
        """act(x · weightᵀ), or x · weightᵀ · factor, rounded once: […, in_features] to […, out_features].

        Args:
            x: in the dtype of the weight, which is also that of the result.
            activation: applied before the result is rounded.
            factor: of the result's shape and dtype; not together with an activation.
        """
        if torch.compiler.is_compiling():
            product: Tensor = torch.ops.nai_t5.blocked_product(x, self.number, self.out_features, activation, factor)
            return product
        return self.product(x, activation, factor)

    def product(self, x: Tensor, activation: str | None, factor: Tensor | None) -> Tensor:
        """See :meth:`__call__`."""
        weight = self._weight
        if self._called and not weight.is_mkldnn:
            self._weight = weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._called = True
        pointwise = torch.ops.mkldnn._linear_pointwise
        out: Tensor
        if factor is not None:
            out = pointwise.binary(x, factor, weight, None, "mul")
        else:
            out = pointwise(x, weight, None, *_POST_OPERATIONS[activation])
        return out

    def original(self) -> Tensor:
        """[out_features, in_features]; the very numbers that were given."""
        weight = self._weight
        dense: Tensor = weight.to_dense() if weight.is_mkldnn else weight
        return dense

    @property
    def is_blocked(self) -> bool:
        return self._weight.is_mkldnn

    def _take_number(self) -> None:
        # A tensor, since an int would be compiled into the graph as a constant, and the graph serve one weight only.
        self.number = torch.tensor(next(_NUMBERS), device="cpu")
        _BY_NUMBER[int(self.number)] = self

    def __getstate__(self) -> dict[str, Any]:
        """The plain weight: a tensor in oneDNN's blocked order can be neither copied nor pickled."""
        return {"weight": self.original()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["weight"])  # type: ignore[misc]

    def __str__(self) -> str:
        return "oneDNN's order" if self.is_blocked else "to be in oneDNN's order"


@torch.library.custom_op("nai_t5::blocked_product", mutates_args=())
def _blocked_product(
    x: Tensor, number: Tensor, out_features: int, activation: str | None, factor: Tensor | None
) -> Tensor:
    """The result of the :class:`OneDNNProduct` that has this number."""
    return _BY_NUMBER[int(number)].product(x, activation, factor)


@_blocked_product.register_fake
def _(x: Tensor, number: Tensor, out_features: int, activation: str | None, factor: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
