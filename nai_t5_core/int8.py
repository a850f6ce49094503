"""Weights and activations in 8 bits on the CPU: about twice the speed of bfloat16's products, for some accuracy.

Weights are quantised once with a scale per output channel, activations in every call with a scale per token; sums are
exact in int32. It is a choice to be made by hand: ``nai-t5 parity --int8`` prints what it costs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nai_t5_core.attention import SelfAttentionLayer
from nai_t5_core.decoder import CrossAttention, CrossAttentionLayer
from nai_t5_core.encoder import T5EncoderStack
from nai_t5_core.kernel_block import PLAIN_LINEARS
from nai_t5_core.layers import FeedForwardLayer, FoldedRMSNorm
from nai_t5_core.model import T5
from nai_t5_core.optimize import Model

# Activations are stored from 0 to 255 around this zero: oneDNN has fast products of unsigned with signed bytes only.
_ZERO_POINT = 128
_LARGEST = 127.0


class Int8Linear(nn.Module):
    """A product in 8 bits. For inference on the CPU only: the weight is no parameter, and cannot be moved or saved.

    Args:
        weight: [out_features, in_features].
        in_scale: [in_features]; activations are multiplied by it before they are quantised, and the weight is divided
            by it. The weight of the norm before, which was folded into this weight, is the right one: it holds down the
            few large channels that would otherwise leave no bits to the others.
        dtype: of the result. What enters attention is of the model's dtype; everything else stays in float32, where
            rounding it would take longer than it saves.
    """

    def __init__(self, weight: Tensor, in_scale: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.in_scale = None if in_scale is None else torch.where(in_scale == 0, 1.0, in_scale)
        exact = weight.detach().float()
        if self.in_scale is not None:
            exact = exact / self.in_scale
        self.out_scale = exact.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        quantised = (exact / self.out_scale[:, None]).round_().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(quantised, None)
        self.zero_points = torch.zeros(self.out_features, dtype=torch.long)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features] in ``dtype``."""
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.out_features, dtype=self.dtype)
        values, token_scale = self._quantise(x.float())
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            values,
            1.0,
            _ZERO_POINT,
            self.packed,
            self.out_scale,
            self.zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return out.mul_(token_scale).to(self.dtype)

    def _quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes [..., in_features], and what a unit of each token is worth: [..., 1] float32."""
        if self.in_scale is not None:
            x = x * self.in_scale
        # Not the infinity norm, which torch computes twenty times slower.
        largest = x.abs().amax(dim=-1, keepdim=True)
        scale = largest.clamp_(min=torch.finfo(torch.float32).tiny).div_(_LARGEST)
        # The conversion cuts off the fraction; the half makes that a rounding.
        return (x / scale).add_(_ZERO_POINT + 0.5).to(torch.uint8), scale

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def can_quantize(stack: T5EncoderStack | T5) -> bool:
    """Whether this machine multiplies bytes fast and exactly, and the model is one to be quantised."""
    return (
        stack.device.type == "cpu"
        and stack.dtype in (torch.float32, torch.bfloat16)
        and "onednn" in torch.backends.quantized.supported_engines
        and any(getattr(torch.cpu, check, bool)() for check in ("_is_vnni_supported", "_is_amx_tile_supported"))
    )


def quantize_int8(stack: Model) -> Model:
    """Replaces every projection by its 8-bit form; each original is let go when its copy is made.

    Embeddings, norms, attention and the residual stay as they are; of a whole T5 the output head is quantised too.

    Returns:
        The same model, changed. It can no longer be moved, cast, saved or trained.

    Raises:
        ValueError: the model is not on the CPU or not in float32 or bfloat16, or this processor has no fast products
            of bytes (AVX512-VNNI or AMX).
    """
    if not can_quantize(stack):
        raise ValueError(
            f"cannot quantise a model in {stack.dtype} on {stack.device} to int8: it takes float32 or bfloat16 on a "
            "CPU with AVX512-VNNI or AMX"
        )
    for layer in stack.modules():
        if isinstance(layer, SelfAttentionLayer):
            _quantize_projections(layer.SelfAttention, layer.layer_norm, stack.dtype)
        elif isinstance(layer, CrossAttentionLayer):
            _quantize_projections(layer.EncDecAttention, layer.layer_norm, stack.dtype)
        elif isinstance(layer, FeedForwardLayer):
            _quantize_projections(layer.DenseReluDense, layer.layer_norm, stack.dtype)
    if isinstance(stack, T5):
        stack.lm_head = Int8Linear(stack.lm_head.weight, dtype=stack.dtype)
    return stack


# Projections whose result goes into attention.
_ATTENTION_INPUTS = ("q", "k", "v", "kv", "qkv")


def _quantize_projections(sublayer: nn.Module, norm: nn.Module, dtype: torch.dtype) -> None:
    norm_weight = norm.folded_weight if isinstance(norm, FoldedRMSNorm) else None
    # What does not read this norm: projections of a sublayer's own results, and of the encoder's states.
    others = ("o", "wo", "k", "v", "kv") if isinstance(sublayer, CrossAttention) else ("o", "wo")
    for name, linear in list(sublayer.named_children()):
        if isinstance(linear, nn.Linear) and type(linear) in PLAIN_LINEARS:
            in_scale = None if name in others else norm_weight
            out_dtype = dtype if name in _ATTENTION_INPUTS else torch.float32
            setattr(sublayer, name, Int8Linear(linear.weight, in_scale, out_dtype))
