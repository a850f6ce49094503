"""Products with weights in oneDNN's own blocked order, which saves reordering them in every call."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from nai_t5_core.facts.config import Activation
from nai_t5_core.model.layers import ACTIVATIONS

# How oneDNN names what it does to a product before rounding it.
_POST_OPERATIONS: dict[str | None, tuple[str, list[Any], str]] = {
    None: ("none", [], ""),
    "relu": ("relu", [], ""),
    "gelu_new": ("gelu", [], "tanh"),
    "gelu": ("gelu", [], "none"),
    "silu": ("swish", [], ""),
}

# By which a compiled graph finds its products, for it cannot hold weights in oneDNN's order.
_NUMBERS = itertools.count()
_BY_NUMBER: WeakValueDictionary[int, OneDNNProduct] = WeakValueDictionary()


class OneDNNProduct:
    """A weight that is put in that order by the second call: a process that encodes once never pays for it.

    Args:
        weight: [out_features, in_features], float32, or bfloat16 where the processor supports it; on the CPU.
    """

    in_8_bits = False

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.plain: Tensor | None = weight.detach()
        self.blocked: Tensor | None = None
        self.called = False
        self._take_number()

    def __call__(self, x: Tensor, activation: Activation | None = None, factor: Tensor | None = None) -> Tensor:
        """act(x · weightᵀ), or x · weightᵀ · factor, rounded once: […, in_features] to […, out_features].

        Args:
            x: in the dtype of the weight, as the result is.
            activation: applied before the result is rounded.
            factor: of the result's shape and dtype; not beside an activation.
        """
        if torch.compiler.is_compiling():
            product: Tensor = torch.ops.nai_t5.blocked_product(x, self.number, self.out_features, activation, factor)
            return product
        return self.product(x, activation, factor)

    def product(self, x: Tensor, activation: str | None, factor: Tensor | None) -> Tensor:
        """See :meth:`__call__`."""
        # The one of the two that is there, whatever another thread does meanwhile.
        plain, blocked = self.plain, self.blocked
        if blocked is None:
            assert plain is not None
            if not self.called:
                self.called = True
                product = F.linear(x, plain)
                product = product if activation is None else ACTIVATIONS[activation](product)  # type: ignore[index]
                return product if factor is None else product * factor
            self.blocked = blocked = torch.ops.mkldnn._reorder_linear_weight(plain)
            self.plain = None
        pointwise = torch.ops.mkldnn._linear_pointwise
        out: Tensor
        if factor is not None:
            out = pointwise.binary(x, factor, blocked, None, "mul")
        else:
            out = pointwise(x, blocked, None, *_POST_OPERATIONS[activation])
        return out

    def lies(self) -> Tensor:
        """[out_features, in_features]; the very numbers that were given."""
        plain, blocked = self.plain, self.blocked
        if blocked is None:
            assert plain is not None
            return plain
        dense: Tensor = blocked.to_dense()
        return dense

    def _take_number(self) -> None:
        # A tensor, since a plain number would be compiled into the graph, which then served one weight alone.
        self.number = torch.tensor(next(_NUMBERS), device="cpu")
        _BY_NUMBER[int(self.number)] = self

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or written: oneDNN's order can be neither."""
        return {"weight": self.lies()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["weight"])  # type: ignore[misc]

    def __str__(self) -> str:
        return "oneDNN's order" if self.blocked is not None else "to be in oneDNN's order"


@torch.library.custom_op("nai_t5::blocked_product", mutates_args=())
def _blocked_product(
    x: Tensor, number: Tensor, out_features: int, activation: str | None, factor: Tensor | None
) -> Tensor:
    """The product with this number."""
    return _BY_NUMBER[int(number)].product(x, activation, factor)


@_blocked_product.register_fake
def _(x: Tensor, number: Tensor, out_features: int, activation: str | None, factor: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
