"""An encoder block with its weights packed for the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.attention import Attend, FusedSelfAttention
from nai_t5_core.encoder import EncoderBlock
from nai_t5_core.kernel_block import PLAIN_LINEARS, KernelBlock, is_supported
from nai_t5_core.layers import GatedFeedForward, NoInit


class PackedBlock(EncoderBlock):
    """A block computed by the kernels from packed copies of its weights, for which the originals are let go.

    They are packed by the second call: a process that encodes once never pays for it. For inference on the CPU only:
    the weights are no parameters, and can neither be moved nor saved.
    """

    def __init__(self, block: EncoderBlock) -> None:
        nn.Module.__init__(self)
        self.layer = block.layer
        layers: Any = block.layer
        self.epsilon: float = layers[0].layer_norm.eps
        self.called = False
        self.kernels: KernelBlock | None = None

    @staticmethod
    def takes(block: nn.Module) -> bool:
        """Whether a block can be packed."""
        return isinstance(block, EncoderBlock) and _has_plain_projections(block) and is_supported(block)

    def forward(self, residual: Tensor, attend: Attend, dtype: torch.dtype) -> Tensor:
        if self.kernels is None:
            if not self.called:
                self.called = True
                return super().forward(residual, attend, dtype)
            self._pack(dtype)
        assert self.kernels is not None
        if residual.requires_grad:
            raise RuntimeError("a prepacked model records no gradients; call it within torch.no_grad()")
        return self.kernels(residual, attend, *(getattr(layer.layer_norm, "weight", None) for layer in self.layer))

    def runs_by_kernels(self, dtype: torch.dtype) -> bool:
        return True

    def _pack(self, dtype: torch.dtype) -> None:
        attends, dense = _sublayers(self)
        qkv_names, inner_names = _names(self)
        weights = [_joined(attends, qkv_names), attends.o.weight, _joined(dense, inner_names), dense.wo.weight]
        self.kernels = KernelBlock.of(weights, dtype, dense, attends.heads, self.epsilon).packed()
        for module, names in ((attends, (*qkv_names, "o")), (dense, (*inner_names, "wo"))):
            for name in names:
                delattr(module, name)

    def unpacked(self) -> EncoderBlock:
        """The block as it was, with its weights in modules."""
        if self.kernels is not None:
            attends, dense = _sublayers(self)
            qkv_names, inner_names = _names(self)
            _part(attends, qkv_names, self.kernels.qkv.unpacked())
            _part(attends, ("o",), self.kernels.o.unpacked())
            _part(dense, inner_names, self.kernels.inner.unpacked())
            _part(dense, ("wo",), self.kernels.wo.unpacked())
        return EncoderBlock(*self.layer)

    def extra_repr(self) -> str:
        return "kernels, to be packed" if self.kernels is None else "kernels, packed"


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


def _joined(module: nn.Module, names: tuple[str, ...]) -> Tensor:
    weights = [getattr(module, name).weight.detach() for name in names]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _part(module: nn.Module, names: tuple[str, ...], weight: Tensor) -> None:
    for name, part in zip(names, weight.chunk(len(names)), strict=True):
        linear = NoInit.Linear(part.shape[1], part.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(part, requires_grad=False)
        setattr(module, name, linear)
