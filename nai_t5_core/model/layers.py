"""The parts of a T5 block outside attention: RMS norm, feed-forward, and the sum with the residual.

The residual is float32 (float64 in a float64 model) from the embedding to the final norm. Every norm computes in that
precision and casts its output to the compute dtype for the projections; every sublayer's output is added in the
residual's precision. So a float16 or bfloat16 model rounds activations, never their running sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nai_t5_core.facts.config import Activation, T5Config


def residual_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the residual stream beside projections of ``compute_dtype``."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu_new": _gelu_tanh,
    "gelu": F.gelu,
    "silu": F.silu,
}


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """act(gate) · up; for half precision computed in float32 and rounded once (2% less error in an encoder)."""
    active = ACTIVATIONS[activation](gate.to(residual_dtype(gate.dtype)))
    if torch.is_grad_enabled():
        return (active * up).to(gate.dtype)
    # Rounded where it is multiplied: on a GPU one launch in place of two.
    return torch.mul(active, up, out=torch.empty_like(up))


def scaled(x: Tensor, scale: float) -> Tensor:
    """x · scale, or x itself where the scale is 1."""
    return x if scale == 1 else x * scale


def add_sublayer(residual: Tensor, out: Tensor, out_scale: float) -> Tensor:
    """residual + out / out_scale, in the residual's precision.

    In inference the sum is written into ``residual``, which belongs to the stack, so that nothing is allocated. Under
    autograd it is a new tensor, since the backward of the norm needs the old values.
    """
    if torch.is_grad_enabled():
        return torch.add(residual, out, alpha=1 / out_scale)
    return residual.add_(out, alpha=1 / out_scale)


class NoInit:
    """``ops`` for models whose weights come from a file: torch's own classes without their random initialisation.

    On the meta device initialising does nothing, but for an Embedding it imports all of torch's compiler, which takes
    longer than loading most checkpoints.
    """

    class Linear(nn.Linear):
        def reset_parameters(self) -> None:
            """Leaves the weight as it was allocated."""

    class Embedding(nn.Embedding):
        def reset_parameters(self) -> None:
            """Leaves the weight as it was allocated."""


class CastingOps:
    """``ops`` for models that stand in for transformers' own: its users cast single projections to another dtype."""

    class Linear(NoInit.Linear):
        """Casts its input to the dtype of its weight."""

        def forward(self, x: Tensor) -> Tensor:
            """[..., in_features] to [..., out_features] in the dtype of the weight."""
            return F.linear(x.to(self.weight.dtype), self.weight)

    Embedding = NoInit.Embedding


# Exactly these classes: subclasses do more than a product (adapters, quantisation, offloading).
PLAIN_LINEARS = (nn.Linear, NoInit.Linear, CastingOps.Linear)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in the precision of x (Zhang and Sennrich, 2019)."""

    def __init__(self, d_model: int, eps: float, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.eps = eps
        # Always float32: it is a few kilobytes, and the norm computes in float32 whatever the compute dtype.
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=torch.float32))

    def forward(self, residual: Tensor) -> Tensor:
        # Under offloading the weight may be elsewhere.
        weight = self.weight.to(residual.device, residual.dtype)
        return F.rms_norm(residual, residual.shape[-1:], weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps:g}"


class FoldedRMSNorm(nn.Module):
    """RMS norm whose weight was multiplied into the projection that follows.

    ``folded_weight``, that weight, takes no part in the computation. LoRA on the fused projection needs it, and so does
    turning a fused model back into the original tensors.
    """

    folded_weight: Tensor

    def __init__(self, d_model: int, eps: float, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("folded_weight", torch.ones(d_model, device=device, dtype=torch.float32))

    def forward(self, residual: Tensor) -> Tensor:
        return F.rms_norm(residual, residual.shape[-1:], None, self.eps)

    def extra_repr(self) -> str:
        return f"{self.folded_weight.shape[0]}, eps={self.eps:g}"


class FeedForward(nn.Module):
    """wo(act(wi(x))) of T5 v1.0.

    ``scale`` multiplies the input and thereby the output, which holds for ReLU and no other activation.
    """

    def __init__(self, config: T5Config, ops: Any, scale: float = 1.0, **factory: Any) -> None:
        super().__init__()
        if scale != 1 and config.activation != "relu":
            raise ValueError(f"a feed-forward with {config.activation} and no gate cannot be scaled by {scale}")
        self.activation = config.activation
        self.scale = scale
        self.wi = ops.Linear(config.d_model, config.d_ff, bias=False, **factory)
        self.wo = ops.Linear(config.d_ff, config.d_model, bias=False, **factory)

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, d_model] to [tokens, d_model]."""
        out: Tensor = self.wo(ACTIVATIONS[self.activation](self.wi(scaled(hidden, self.scale))))
        return out

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        for projection in (self.wi, self.wo):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5, generator=generator)


class GatedFeedForward(nn.Module):
    """wo(act(wi_0(x)) · wi_1(x)), every projection a module of its own (Shazeer, 2020).

    ``scale`` multiplies the input of wi_1, and so the output.
    """

    def __init__(self, config: T5Config, ops: Any, scale: float = 1.0, **factory: Any) -> None:
        super().__init__()
        self.activation = config.activation
        self.scale = scale
        self.wi_0 = ops.Linear(config.d_model, config.d_ff, bias=False, **factory)
        self.wi_1 = ops.Linear(config.d_model, config.d_ff, bias=False, **factory)
        self.wo = ops.Linear(config.d_ff, config.d_model, bias=False, **factory)

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, d_model] to [tokens, d_model]."""
        gate, up = self.wi_0(hidden), self.wi_1(scaled(hidden, self.scale))
        out: Tensor = self.wo(gated(gate, up, self.activation))
        return out

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        for projection in (self.wi_0, self.wi_1, self.wo):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5, generator=generator)


class FusedGatedFeedForward(nn.Module):
    """The gated feed-forward with gate and up in one matrix: rows 0…d_ff are the gate, the rest is up."""

    def __init__(self, config: T5Config, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.activation = config.activation
        self.wi = ops.Linear(config.d_model, 2 * config.d_ff, bias=False, **factory)
        self.wo = ops.Linear(config.d_ff, config.d_model, bias=False, **factory)

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, d_model] to [tokens, d_model]."""
        gate, up = self.wi(hidden).chunk(2, dim=-1)
        out: Tensor = self.wo(gated(gate, up, self.activation))
        return out

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        for projection in (self.wi, self.wo):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5, generator=generator)


class FeedForwardLayer(nn.Module):
    """Norm, feed-forward, and the sum with the residual: ``block[i].layer[-1]``.

    The feed-forward's output comes multiplied by ``out_scale``; the sum divides by it.
    """

    def __init__(self, norm: nn.Module, feed_forward: nn.Module, out_scale: float = 1.0) -> None:
        super().__init__()
        self.DenseReluDense = feed_forward
        self.layer_norm = norm
        self.out_scale = out_scale

    def forward(self, residual: Tensor, dtype: torch.dtype) -> Tensor:
        """[tokens, d_model] residual to residual, changed in place in inference; ``dtype`` is the compute dtype."""
        out = self.DenseReluDense(self.layer_norm(residual).to(dtype))
        return add_sublayer(residual, out, self.out_scale)
