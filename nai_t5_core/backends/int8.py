"""Weights and activations in 8 bits on the CPU: about twice the speed of bfloat16's products, for some accuracy.

Weights are quantised once with a scale per output channel, activations in every call with a scale per token; sums are
exact in int32. It is a choice to be made by hand: ``nai-t5 parity --int8`` prints what it costs.
"""

from __future__ import annotations

import torch
from torch import nn

from nai_t5_core.backends.int8_block import Int8Block
from nai_t5_core.backends.int8_linear import Int8Linear, Int8Weight
from nai_t5_core.backends.prepack import Model, ProductsChoice, take_blocks
from nai_t5_core.model.attention import SelfAttentionLayer
from nai_t5_core.model.decoder import CrossAttention, CrossAttentionLayer
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.kernel_block import PLAIN_LINEARS
from nai_t5_core.model.layers import FeedForwardLayer, FoldedRMSNorm
from nai_t5_core.model.t5 import T5Model


def can_quantize(stack: T5EncoderStack | T5Model) -> bool:
    """Whether this machine multiplies bytes fast and exactly, and the model is one to be quantised."""
    return (
        stack.device.type == "cpu"
        and stack.dtype in (torch.float32, torch.bfloat16)
        and "onednn" in torch.backends.quantized.supported_engines
        and any(getattr(torch.cpu, check, bool)() for check in ("_is_vnni_supported", "_is_amx_tile_supported"))
    )


def quantize_int8(stack: Model, products: ProductsChoice = "auto") -> Model:
    """Replaces every projection by its 8-bit form; each original is let go when its copy is made.

    Embeddings, norms, attention and the residual stay as they are; of a whole T5 the output head is quantised too.

    Args:
        products: see :func:`nai_t5_core.backends.prepack.prepack`.

    Returns:
        The same model, changed. It can no longer be moved, cast, saved or trained.

    Raises:
        ValueError: the model is not on the CPU or not in float32 or bfloat16, or this processor has no fast products
            of bytes (AVX512-VNNI or AMX); or the kernels were asked for and cannot compute it.
    """
    if not can_quantize(stack):
        raise ValueError(
            f"cannot quantise a model in {stack.dtype} on {stack.device} to int8: it takes float32 or bfloat16 on a "
            "CPU with AVX512-VNNI or AMX"
        )
    take_blocks(stack, products, Int8Block)
    for layer in stack.modules():
        if isinstance(layer, SelfAttentionLayer):
            _quantize_projections(layer.SelfAttention, layer.layer_norm, stack.dtype)
        elif isinstance(layer, CrossAttentionLayer):
            _quantize_projections(layer.EncDecAttention, layer.layer_norm, stack.dtype)
        elif isinstance(layer, FeedForwardLayer):
            _quantize_projections(layer.DenseReluDense, layer.layer_norm, stack.dtype)
    if isinstance(stack, T5Model):
        stack.lm_head = Int8Linear(Int8Weight.of(stack.lm_head.weight), stack.dtype)
    return stack


def _quantize_projections(sublayer: nn.Module, norm: nn.Module, dtype: torch.dtype) -> None:
    norm_weight = norm.folded_weight if isinstance(norm, FoldedRMSNorm) else None
    # What does not read this norm: projections of a sublayer's own results, and of the encoder's states.
    others = ("o", "wo", "k", "v", "kv") if isinstance(sublayer, CrossAttention) else ("o", "wo")
    for name, linear in list(sublayer.named_children()):
        if isinstance(linear, nn.Linear) and type(linear) in PLAIN_LINEARS:
            weight = Int8Weight.of(linear.weight, None if name in others else norm_weight)
            setattr(sublayer, name, Int8Linear.named(name, weight, dtype))
