"""Layers of a ComfyUI T5 whose weights stay quantised, computed by our CPU kernels, which read the bytes as they lie.

A layer whose numbers are changed in every call, by patches or hooks, runs module by module meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch

from comfy_nai_t5.fused import JoinedKernels, no_plain_tensor, norm_weights, norms_of, not_plain, projections
from comfy_nai_t5.quantised import Quantised
from nai_t5_core.backends.kernels.block import KernelBlock
from nai_t5_core.backends.kernels.pieces import WEIGHT_FORMATS, WeightPiece
from nai_t5_core.backends.kernels.sets import InstructionSet
from nai_t5_core.backends.kernels.weights import KernelWeight
from nai_t5_core.backends.quantised.forms import QuantisedForm
from nai_t5_core.backends.quantised.pieces import is_here, is_read, piece_of
from nai_t5_core.model.block import is_watched


def has_quantised(block: Any) -> bool:
    """Whether a weight of a layer stays quantised."""
    return any(isinstance(linear, Quantised) for linear in projections(block))


def refuses_bytes(block: Any, device: torch.device | None = None) -> str | None:
    """Why the kernels cannot compute such a layer at this moment, as the end of a sentence; None if they can.

    Args:
        device: where it is to run; None where that is not to be considered, since the weights are not there yet.
    """
    norms, linears = norms_of(block), projections(block)
    if is_watched((*norms, *linears)):
        return "other software has hooked into its modules"
    for module in (*norms, *linears):
        if device is not None and module.weight.device != device:
            return f"its weights come from {module.weight.device} to {device} at every call"
    return next(filter(None, map(_refuses_linear, linears)), None)


def _refuses_linear(linear: Any) -> str | None:
    if not isinstance(linear, Quantised):
        unread = None if linear.weight.dtype in WEIGHT_FORMATS else "its weights are in a dtype that no kernel reads"
        return not_plain(linear) or no_plain_tensor(linear) or unread
    if not is_read(linear.kind):
        return f"its weights stay quantised, in a kind that the kernels do not read ({linear.kind.name})"
    if linear.changes:
        return "its quantised weights are patched at every call"
    return None if is_here(linear.form) else "its quantised weights are not on the CPU"


class QuantisedLayer:
    """What the kernels were told of a layer, for which there must be no :func:`refuses_bytes`; no number is kept.

    It serves while the layer has the same weights, with the same values.
    """

    def __init__(self, block: Any, dtype: torch.dtype, instructions: InstructionSet) -> None:
        self._made_of = _state(block, dtype)
        # Kept, so that the identities in the state are of nothing else.
        self._weights = [_weight(linear) for linear in projections(block)]
        self._kernels = _kernels(block, dtype, instructions)

    def is_made_of(self, block: Any, dtype: torch.dtype) -> bool:
        return self._made_of == _state(block, dtype)

    def runner(self, block: Any) -> JoinedKernels:
        """What computes the layer in the next call."""
        return JoinedKernels(norm_weights(block), self._kernels)


def _weight(linear: Any) -> Any:
    return linear.form if isinstance(linear, Quantised) else linear.weight


def _state(block: Any, dtype: torch.dtype) -> tuple[object, ...]:
    found: list[object] = [dtype]
    for weight in map(_weight, projections(block)):
        is_form = isinstance(weight, QuantisedForm)
        found.append(weight.state if is_form else (id(weight), weight.data_ptr(), weight.shape, weight.dtype))
    return tuple(found)


def _kernels(block: Any, dtype: torch.dtype, instructions: InstructionSet) -> KernelBlock:
    q, k, v, o, *inner, wo = projections(block)
    attention, dense = block.layer[0], block.layer[-1].DenseReluDense
    weights = []
    for linears in ([q, k, v], [o], inner, [wo]):
        pieces, is_gated = list(map(_piece, linears)), len(linears) == 2
        stored = instructions.stored[dtype]
        weights.append(KernelWeight.of_pieces(pieces, dtype, stored, is_gated, instructions))
    heads, epsilon = attention.SelfAttention.heads, attention.layer_norm.variance_epsilon
    return KernelBlock(tuple(weights), dtype, dense.activation, heads, epsilon)


def _piece(linear: Any) -> WeightPiece:
    if isinstance(linear, Quantised):
        return piece_of(linear.form)
    return WeightPiece(linear.weight.detach(), *linear.weight.shape)
