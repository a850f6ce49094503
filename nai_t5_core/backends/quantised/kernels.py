"""Blocks whose weights stay quantised, computed by our CPU kernels, which read the bytes of a file as they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.backends.held import ByModules
from nai_t5_core.backends.kernels.block import KernelBlock
from nai_t5_core.backends.kernels.build import prepare_kernels, set_to_use
from nai_t5_core.backends.kernels.pieces import WeightPiece
from nai_t5_core.backends.kernels.runners import (
    kernel_block,
    norm_weights,
    places,
    refuses_dtype,
    refuses_mathematics,
)
from nai_t5_core.backends.kernels.sets import InstructionSet
from nai_t5_core.backends.kernels.weights import KernelWeight
from nai_t5_core.backends.quantised.forms import QuantisedForm
from nai_t5_core.backends.quantised.pieces import is_here, is_read, piece_of
from nai_t5_core.backends.quantised.projections import QuantisedLinear
from nai_t5_core.model.attention import Attend
from nai_t5_core.model.block import Block, BlockRunner, Lending, ModulesRecord, is_watched, operations_are_watched
from nai_t5_core.model.decoder import DecoderBlock
from nai_t5_core.model.layers import PLAIN_LINEARS, FusedGatedFeedForward, GatedFeedForward

# What computes a block whose projections make numbers of quantised weights in every call.
BY_QUANTISED_WEIGHTS = "quantised weights"


@dataclass
class _Looked:
    """What was found of a block, and of what."""

    dtype: torch.dtype
    seen: ModulesRecord
    forms: list[tuple[QuantisedLinear, tuple[QuantisedForm, ...]]]
    kernels: KernelBlock | None

    @property
    def is_same(self) -> bool:
        # Moving a projection, or another scale, gives it other forms.
        return all(linear.forms is forms for linear, forms in self.forms) and self.seen.is_same


class QuantisedKernels:
    """Computes a block by the kernels, from quantised weights; wherever these cannot, its modules do.

    Weights of the block that are not quantised are read as they are. The block may be moved and cast.

    Args:
        instructions: what to compute with; None: the best that this processor has, unless oneDNN has something better.
    """

    # Beside a live LoRA the modules compute, from the same bytes.
    lending: Lending | None = None

    def __init__(self, instructions: InstructionSet | None = None) -> None:
        self._named = instructions
        self._looked: _Looked | None = None

    @property
    def name(self) -> str:
        instructions, looked = set_to_use(self._named), self._looked
        if instructions is None or (looked is not None and looked.kernels is None and looked.is_same):
            return BY_QUANTISED_WEIGHTS
        widening = "" if looked is None or looked.kernels is None else looked.kernels.widening
        return f"{instructions.title} kernels, {BY_QUANTISED_WEIGHTS}{widening}"

    def __call__(self, block: Block, residual: Tensor, attend: Attend, dtype: torch.dtype) -> Tensor | None:
        if not residual.is_cpu or operations_are_watched() or _is_trained(block, residual):
            return None
        kernels = self._kernels(block, dtype)
        return None if kernels is None else kernels(residual, attend, *norm_weights(block))

    def attends(self, block: Block, dtype: torch.dtype) -> bool:
        instructions = set_to_use(self._named)
        return instructions is not None and refuses(block, dtype, instructions) is None

    def _kernels(self, block: Block, dtype: torch.dtype) -> KernelBlock | None:
        if self._looked is None or self._looked.dtype != dtype or not self._looked.is_same:
            kernels = None
            if self.attends(block, dtype) and prepare_kernels(self._named) is None:
                kernels = _kernels_of(block, dtype, set_to_use(self._named))
            modules = list(block.modules())[1:]
            forms = [(module, module.forms) for module in modules if isinstance(module, QuantisedLinear)]
            self._looked = _Looked(dtype, ModulesRecord(modules), forms, kernels)
        return self._looked.kernels

    def forget(self) -> None:
        self._looked = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_named": self._named, "_looked": None}


def runner_of_quantised(block: Block, instructions: InstructionSet | None = None) -> BlockRunner:
    """What computes a block that has quantised weights: the kernels where they read its kinds, else its modules.

    Where the modules do, the kernels compute the products of the projections whose kinds they read.
    """
    for module in block.modules():
        if isinstance(module, QuantisedLinear):
            module.product.use(instructions)
    kinds = dict.fromkeys(form.weight.kind.name for form in _forms(block) if not is_read(form.weight.kind))
    if isinstance(block, DecoderBlock):
        return ByModules(BY_QUANTISED_WEIGHTS)
    if kinds:
        return ByModules(f"{BY_QUANTISED_WEIGHTS} (the kernels do not read {', '.join(kinds)})")
    return QuantisedKernels(instructions)


def refuses(block: Block, dtype: torch.dtype, instructions: InstructionSet) -> str | None:
    """Why the kernels cannot compute a block from its present weights, as a sentence; None if they can."""
    if refused := refuses_dtype(dtype, instructions):
        return refused
    for owner, names in places(block):
        for name in names:
            if refused := _refuses_projection(getattr(owner, name), dtype):
                return refused
    if is_watched(block.modules()):
        return "other software hooks into its modules"
    return refuses_mathematics(block)


def _refuses_projection(linear: Any, dtype: torch.dtype) -> str | None:
    if type(linear) is QuantisedLinear:
        unread = next((form.weight.kind.name for form in linear.forms if not is_read(form.weight.kind)), None)
        if unread is not None:
            return f"the kernels do not read {unread}"
        if not all(map(is_here, linear.forms)):
            return "a quantised weight is not on the CPU"
    elif type(linear) in PLAIN_LINEARS:
        weight = linear.weight
        is_plain = type(weight) is nn.Parameter and weight.dtype == dtype and weight.is_cpu and weight.is_contiguous()
        if not is_plain:
            return f"a weight is no plain {dtype} on the CPU"
    else:
        return f"a projection is of class {type(linear).__name__}"
    if linear.in_features % 2:
        return f"a projection has {linear.in_features} inputs; the kernels need an even number"
    return None


def _kernels_of(block: Block, dtype: torch.dtype, instructions: InstructionSet | None) -> KernelBlock:
    assert instructions is not None
    weights = []
    for owner, names in places(block):
        is_gated = isinstance(owner, (FusedGatedFeedForward, GatedFeedForward)) and names != ("wo",)
        pieces = [piece for name in names for piece in _pieces(getattr(owner, name))]
        weights.append(KernelWeight.of_pieces(pieces, dtype, instructions.stored[dtype], is_gated, instructions))
    return kernel_block(block, weights, dtype)


def _pieces(linear: Any) -> list[WeightPiece]:
    if isinstance(linear, QuantisedLinear):
        return [piece_of(form) for form in linear.forms]
    return [WeightPiece(linear.weight.detach(), *linear.weight.shape)]


def _forms(block: Block) -> list[QuantisedForm]:
    return [form for module in block.modules() if isinstance(module, QuantisedLinear) for form in module.forms]


def _is_trained(block: Block, residual: Tensor) -> bool:
    return torch.is_grad_enabled() and (
        residual.requires_grad or any(each.requires_grad for each in block.parameters())
    )
