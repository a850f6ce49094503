"""How large a layer's activations get, and the scales that keep them inside float16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.facts.scales import LayerScales, scale_for
from nai_t5_core.model.attention import FusedSelfAttention
from nai_t5_core.model.decoder import DecoderBlock
from nai_t5_core.model.encoder_block import EncoderBlock
from nai_t5_core.model.layers import FusedGatedFeedForward, GatedFeedForward

# Below this exponent float16 numbers lose bits (subnormal), and below the second they are zero.
_NORMAL_EXPONENT, _LEAST_EXPONENT = -14, -25
_EXPONENTS = 160

QUANTITIES = ("q", "k", "v", "attention_out", "gate", "up", "hidden", "feed_forward_out")
CROSS_QUANTITIES = ("cross_q", "cross_k", "cross_v", "cross_attention_out")
# What no scale reaches: beyond float16 in these, a model is beyond float16.
UNSCALED = ("q", "k", "v", "gate", "cross_q", "cross_k", "cross_v")


@dataclass
class LayerMaxima:
    """Largest absolute values of one layer's activations over everything observed, as the unscaled model has them.

    ``up`` is the whole in-projection where there is no gate; then ``gate`` stays 0. A decoder's layer has the
    quantities of its cross-attention as well. ``hidden_exponents`` counts the hidden values by binary exponent, from
    −80 on, zeros aside.
    """

    maxima: dict[str, float] = field(default_factory=lambda: dict.fromkeys(QUANTITIES, 0.0))
    hidden_exponents: Tensor = field(default_factory=lambda: torch.zeros(_EXPONENTS, dtype=torch.long))

    @classmethod
    def of_decoder(cls) -> LayerMaxima:
        return cls(dict.fromkeys((*QUANTITIES, *CROSS_QUANTITIES), 0.0))

    def add(self, quantity: str, values: Tensor, scale: float) -> None:
        """Takes note of a tensor that holds ``quantity`` times ``scale``."""
        if values.numel():
            self.maxima[quantity] = max(self.maxima[quantity], float(values.abs().max()) / scale)

    def add_exponents(self, hidden: Tensor, scale: float) -> None:
        exponents = torch.frexp(hidden[hidden != 0].float() / scale)[1].long() + _EXPONENTS // 2
        self.hidden_exponents += torch.bincount(exponents.clamp(0, _EXPONENTS - 1), minlength=_EXPONENTS).cpu()

    def lost_share(self, scale: float) -> tuple[float, float]:
        """The shares of the non-zero hidden values that are subnormal, and zero, in float16 after scaling."""
        total = max(int(self.hidden_exponents.sum()), 1)
        # frexp's mantissa is in [½, 1), so a number with exponent e lies in [2^(e−1), 2^e).
        shift = _EXPONENTS // 2 - int(math.log2(scale))
        zeros = int(self.hidden_exponents[: max(_LEAST_EXPONENT + shift + 1, 0)].sum())
        below = int(self.hidden_exponents[: max(_NORMAL_EXPONENT + shift + 1, 0)].sum())
        return (below - zeros) / total, zeros / total


def observe(
    block: EncoderBlock | DecoderBlock,
    scales: LayerScales,
    residual: Tensor,
    attends: Sequence[Callable[..., Tensor]],
    into: LayerMaxima,
) -> Tensor:
    """Runs one layer in the residual's precision, notes its maxima, and returns the next residual.

    The block is of either layout and in float32 or float64; ``scales`` are those it was built with, and ``attends`` the
    attention functions that it is called with, one or in a decoder two. The keys and values that cross-attention reads
    are computed elsewhere, and so not noted.
    """
    attention: Any = block.layer[0]
    feed_forward: Any = block.layer[-1]
    dense = feed_forward.DenseReluDense
    is_fused = isinstance(attention.SelfAttention, FusedSelfAttention)
    # In the separate layout the factor of the out-projection is on its input, together with that of the hidden product.
    inner = scales.hidden if is_fused else feed_forward.out_scale
    with ExitStack() as hooks:
        for module, notes in _watched(attention.SelfAttention, dense, inner):
            hooks.enter_context(_noting(module, notes, into))
        hooks.enter_context(_output_of(attention.SelfAttention.o, "attention_out", attention.out_scale, into))
        hooks.enter_context(_output_of(dense.wo, "feed_forward_out", feed_forward.out_scale, into))
        hooks.enter_context(_hidden_of(dense.wo, inner, into))
        if isinstance(block, DecoderBlock):
            cross: Any = block.layer[1]
            hooks.enter_context(_output_of(cross.EncDecAttention.q, "cross_q", 1.0, into))
            hooks.enter_context(_output_of(cross.EncDecAttention.o, "cross_attention_out", cross.out_scale, into))
        out: Tensor = block(residual, *attends, residual.dtype)
        return out


def _watched(attention: Any, dense: Any, inner: float) -> Iterator[tuple[nn.Module, list[tuple[str, float]]]]:
    """Modules, and the quantities that their output holds side by side, each with its factor."""
    if isinstance(attention, FusedSelfAttention):
        yield attention.qkv, [("q", 1.0), ("k", 1.0), ("v", 1.0)]
    else:
        for name in ("q", "k", "v"):
            yield getattr(attention, name), [(name, 1.0)]
    if isinstance(dense, FusedGatedFeedForward):
        yield dense.wi, [("gate", 1.0), ("up", inner)]
    elif isinstance(dense, GatedFeedForward):
        yield dense.wi_0, [("gate", 1.0)]
        yield dense.wi_1, [("up", inner)]
    else:
        yield dense.wi, [("up", inner)]


@contextmanager
def _noting(module: nn.Module, notes: list[tuple[str, float]], into: LayerMaxima) -> Iterator[None]:
    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        for (quantity, scale), part in zip(notes, output.chunk(len(notes), dim=-1), strict=True):
            into.add(quantity, part, scale)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _output_of(module: nn.Module, quantity: str, scale: float, into: LayerMaxima) -> Any:
    return _noting(module, [(quantity, scale)], into)


@contextmanager
def _hidden_of(wo: nn.Module, inner: float, into: LayerMaxima) -> Iterator[None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        into.add("hidden", inputs[0], inner)
        into.add_exponents(inputs[0], inner)

    handle = wo.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def scales_for(maxima: LayerMaxima, headroom: float, can_scale_hidden: bool = True) -> LayerScales:
    """The scales of a layer with these maxima. Its up projection carries the hidden scale, so that may bind as well."""
    largest = max(maxima.maxima["hidden"], maxima.maxima["up"]) if can_scale_hidden else 0.0
    return LayerScales(
        attention_out=scale_for(maxima.maxima["attention_out"], headroom),
        feed_forward_out=scale_for(maxima.maxima["feed_forward_out"], headroom),
        hidden=scale_for(largest, headroom),
        cross_attention_out=scale_for(maxima.maxima.get("cross_attention_out", 0.0), headroom),
    )
