"""An encoder block with its weights packed for the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.model.attention import Attend, FusedSelfAttention
from nai_t5_core.model.encoder_block import EncoderBlock
from nai_t5_core.model.fixed_weights import FixedWeights
from nai_t5_core.model.kernel_block import PLAIN_LINEARS, KernelBlock, is_supported
from nai_t5_core.model.layers import GatedFeedForward, NoInit


class PackedBlock(FixedWeights, EncoderBlock):
    """A block computed by the kernels from packed copies of its weights, for which the originals are let go.

    They are packed by the second call: a process that encodes once never pays for it. For inference on the CPU only:
    the weights are no parameters, and can neither be moved nor saved.

    Args:
        block: one that :meth:`takes` accepts; its projections are taken out of it.
        dtype: what to compute in, that of the weights.
    """

    kernels: KernelBlock

    def __init__(self, block: EncoderBlock, dtype: torch.dtype) -> None:
        FixedWeights.__init__(self, dtype)
        self.layer = block.layer
        self.called = self.is_packed = False
        self._prepare([self._joined(_taken(module, names)) for module, names in self._places()], dtype)

    @classmethod
    def takes(cls, block: nn.Module) -> bool:
        """Whether a block can be packed."""
        return isinstance(block, EncoderBlock) and _has_plain_projections(block) and is_supported(block)

    def forward(self, residual: Tensor, attend: Attend, dtype: torch.dtype) -> Tensor:
        self.refuse_gradients(residual)
        if self.called and not self.is_packed:
            self.kernels, self.is_packed = self.kernels.packed(), True
        self.called = True
        return self.kernels(residual, attend, *self._norm_weights())

    def runs_by_kernels(self, dtype: torch.dtype) -> bool:
        return True

    def plain_weight(self, path: str, like: Tensor) -> Tensor:
        """See :func:`nai_t5_core.backends.plain_twin.plain_weight`; the very numbers that were given."""
        sublayer, _, name = path.rpartition(".")
        module = self.get_submodule(sublayer)
        for place, (owner, names) in enumerate(self._places()):
            if owner is module and name in names:
                return self._weight_at(place).chunk(len(names))[names.index(name)]
        raise AttributeError(f"a block of the kernels has no projection {path}")

    def unpacked(self) -> EncoderBlock:
        """The block as it was, with its weights in modules."""
        for place, (module, names) in enumerate(self._places()):
            for name, projection in zip(names, self._projections(place, names), strict=True):
                setattr(module, name, projection)
        return EncoderBlock(*self.layer)

    @staticmethod
    def _joined(projections: list[Any]) -> Any:
        """The weights of these projections one above the other."""
        weights = [projection.weight.detach() for projection in projections]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def _prepare(self, weights: list[Any], dtype: torch.dtype) -> None:
        """Sets ``kernels`` on the weights of qkv, o, inner and wo."""
        self.kernels = self._kernels_on(weights, dtype)

    def _kernels_on(
        self, weights: Sequence[Tensor], dtype: torch.dtype, scales: Sequence[Tensor | None] = (None,) * 4
    ) -> KernelBlock:
        attends, dense = _sublayers(self)
        layers: Any = self.layer
        return KernelBlock.of(weights, dtype, dense, attends.heads, layers[0].layer_norm.eps, scales)

    def _norm_weights(self) -> list[Tensor | None]:
        """Of attention and feed-forward, in float32; None where it is multiplied into a projection."""
        weights = [getattr(layer.layer_norm, "weight", None) for layer in self.layer]
        # A cast of the model to the dtype that it has casts these, too.
        return [None if weight is None else weight.detach().float() for weight in weights]

    def _weight_at(self, place: int) -> Tensor:
        """What was taken from a place, as one weight."""
        return self.kernels.weights[place].unpacked()

    def _projections(self, place: int, names: tuple[str, ...]) -> list[nn.Module]:
        """The modules of what was taken from a place."""
        return [linear_of(part) for part in self._weight_at(place).chunk(len(names))]

    def _places(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        """Where the weights of qkv, o, inner and wo are, or were."""
        attends, dense = _sublayers(self)
        qkv_names, inner_names = _names(self)
        return [(attends, qkv_names), (attends, ("o",)), (dense, inner_names), (dense, ("wo",))]

    def extra_repr(self) -> str:
        return "kernels, packed" if self.is_packed else "kernels, to be packed"


def _sublayers(block: EncoderBlock) -> tuple[Any, Any]:
    """The modules of attention and feed-forward."""
    layers: Any = block.layer
    return layers[0].SelfAttention, layers[-1].DenseReluDense


def _names(block: EncoderBlock) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The projections that the kernels take as one: those of q, k and v, and those of gate and up."""
    attends, dense = _sublayers(block)
    return (
        ("qkv",) if isinstance(attends, FusedSelfAttention) else ("q", "k", "v"),
        ("wi_0", "wi_1") if isinstance(dense, GatedFeedForward) else ("wi",),
    )


def _has_plain_projections(block: EncoderBlock) -> bool:
    qkv_names, inner_names = _names(block)
    attends, dense = _sublayers(block)
    projections = [getattr(attends, name) for name in (*qkv_names, "o")]
    projections += [getattr(dense, name) for name in (*inner_names, "wo")]
    return all(type(linear) in PLAIN_LINEARS and linear.in_features % 2 == 0 for linear in projections)


def _taken(module: Any, names: tuple[str, ...]) -> list[Any]:
    """The projections with these names, which are gone from the module then."""
    projections = [getattr(module, name) for name in names]
    for name in names:
        delattr(module, name)
    return projections


def linear_of(weight: Tensor) -> nn.Module:
    """A projection around a weight [out_features, in_features]."""
    linear = NoInit.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
