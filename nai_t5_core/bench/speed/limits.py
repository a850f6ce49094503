"""What our times are compared with: the projections alone, by oneDNN, and the rate of the multiplying instruction."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from nai_t5_core.backends.kernels.calls import multiply_in_registers
from nai_t5_core.backends.kernels.sets import InstructionSet
from nai_t5_core.bench.roofline import projection_shapes
from nai_t5_core.facts.config import T5Config

_ROUNDS = 4_000_000  # some hundredths of a second


def register_rate(dtype: torch.dtype, instructions: InstructionSet | None) -> float:
    """Operations per second of the instruction by which our CPU kernels multiply weights in ``dtype``."""
    started = time.perf_counter()
    operations = multiply_in_registers(dtype, _ROUNDS, instructions)
    return operations / (time.perf_counter() - started)


class BareProjections:
    """Every projection of every layer in oneDNN's blocked order, in the encoder's order.

    Each has its own memory, so that weights pass through the caches as they do in the model; all layers have the same
    random values. It needs a CPU whose oneDNN computes in ``dtype``.
    """

    def __init__(self, config: T5Config, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.shapes = projection_shapes(config)
        drawn = {shape: torch.randn(shape).to(dtype) for shape in set(self.shapes)}
        self.layers: list[list[Tensor]] = [
            [torch.ops.mkldnn._reorder_linear_weight(drawn[shape]) for shape in self.shapes]
            for _ in range(config.num_layers)
        ]

    def of(self, tokens: int) -> Callable[[], None]:
        """A function that computes the products for that many rows, to be timed."""
        inputs = {width: torch.randn(tokens, width).to(self.dtype) for _, width in self.shapes}

        def multiply() -> None:
            for weights in self.layers:
                for (_, width), weight in zip(self.shapes, weights, strict=True):
                    torch.ops.mkldnn._linear_pointwise(inputs[width], weight, None, "none", [], "")

        return multiply
