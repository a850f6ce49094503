"""The watch over an encoder's output: a value that is not finite never leaves.

In float16 the cause is found, the scale of the layer at fault is tightened, and the batch is run again. What no scale
can mend is an error that names the tensor.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.encoder import EncoderBlock, T5EncoderStack
from nai_t5_core.layers import FusedGatedFeedForward, residual_dtype
from nai_t5_core.lora_live import LiveLinear
from nai_t5_core.maxima import LayerMaxima, observe, scales_for
from nai_t5_core.scales import FLOAT16_MAX, LayerScales

# What a tightened scale leaves between the largest value seen and float16's largest number.
HEADROOM = 4.0


class NotFiniteError(ValueError):
    """The encoder gives NaN or infinity, and no scale can help; the message names the tensor or layer."""


class ScaleTightenedWarning(UserWarning):
    """A float16 encode overflowed, and was run again with tighter scales."""


@torch.no_grad()
def encode_guarded(stack: T5EncoderStack, *inputs: Any, **options: Any) -> Tensor:
    """``stack(*inputs, **options)``, with the promise that the result is finite.

    Costs one reduction over the result. If a float16 model overflows, its scales are tightened for good (see
    ``stack.scales``), which one :class:`ScaleTightenedWarning` tells.

    Raises:
        NotFiniteError: the weights or the given embeddings are not finite, or a value that has no scale overflows.
    """
    out: Tensor = stack(*inputs, **options)
    changes: list[str] = []
    while not is_finite(out):
        changes.append(_tighten_first_fault(stack, *inputs, **options))
        out = stack(*inputs, **options)
    if changes:
        text = f"float16 overflowed; {'; '.join(changes)}. These scales hold from now on; save them with save_scales()"
        warnings.warn(text, ScaleTightenedWarning, stacklevel=2)
    return out


def is_finite(values: Tensor) -> bool:
    """Whether a tensor is without NaN and infinity: one sum, in a precision that it cannot overflow."""
    return bool(values.sum(dtype=residual_dtype(values.dtype)).isfinite())


def _tighten_first_fault(stack: T5EncoderStack, *inputs: Any, **options: Any) -> str:
    """Finds the first layer that gives something not finite and tightens its scales; returns what was done."""
    embeddings, plan, _ = stack.prepare(*inputs, **options)
    if not is_finite(embeddings):
        raise NotFiniteError(f"{_culprit(stack, 'shared') or 'inputs_embeds'} holds values that are not finite")
    before = embeddings
    for index, after in enumerate(stack.encoder.residuals(embeddings, plan, stack.dtype)):
        if not is_finite(after):
            return _tighten(stack, index - 1, before, plan)
        before = after
    culprit = _culprit(stack, "encoder.final_layer_norm")
    raise NotFiniteError(
        f"{culprit} holds values that are not finite"
        if culprit
        else f"the output itself exceeds {stack.dtype}; use bfloat16 or float32"
    )


def _culprit(stack: T5EncoderStack, prefix: str) -> str | None:
    """The first weight under a prefix that is not finite."""
    tensors = stack.state_dict().items()
    return next((name for name, tensor in tensors if name.startswith(prefix) and not tensor.isfinite().all()), None)


def _tighten(stack: T5EncoderStack, index: int, residual: Tensor, plan: Any) -> str:
    culprit = _culprit(stack, f"encoder.block.{index}.")
    if culprit:
        raise NotFiniteError(f"{culprit} holds values that are not finite; the weights are damaged")
    seen = _observe_in_float32(stack, index, residual, plan)
    old = stack.scales.layers[index]
    wanted = scales_for(seen, HEADROOM, can_scale_hidden=stack.config.can_scale_hidden)
    new = LayerScales(**{name: min(scale, getattr(wanted, name)) for name, scale in asdict(old).items()})
    if stack.dtype != torch.float16 or new == old:
        limit = torch.finfo(stack.dtype).max
        beyond = [f"{name} reaches {largest:.3g}" for name, largest in seen.maxima.items() if not largest <= limit]
        raise NotFiniteError(
            f"layer {index} exceeds {stack.dtype} (its {', its '.join(beyond) or 'logits overflow'}), and no scale can "
            "mend that; use bfloat16 or float32"
        )
    rescale(stack, index, new)
    changed = [name for name in asdict(old) if getattr(old, name) != getattr(new, name)]
    return f"layer {index}: " + ", ".join(
        f"{name} reaches {seen.maxima[name]:.3g} (limit {FLOAT16_MAX:.0f}), scale {getattr(old, name):g} "
        f"tightened to {getattr(new, name):g}"
        for name in changed
    )


def _observe_in_float32(stack: T5EncoderStack, index: int, residual: Tensor, plan: Any) -> LayerMaxima:
    """The true maxima of a layer on this residual."""
    attend = plan.layer(stack.encoder.bias_table(index).to(residual.dtype))
    block = copy.deepcopy(stack.encoder.block[index]).float()
    assert isinstance(block, EncoderBlock)
    seen = LayerMaxima()
    observe(block, stack.scales.layers[index], residual, attend, seen)
    return seen


@torch.no_grad()
def rescale(stack: T5EncoderStack, index: int, scales: LayerScales) -> None:
    """Gives a layer other scales. In the fused layout its weights are replaced by multiples of them."""
    old = stack.scales.layers[index]
    block: Any = stack.encoder.block[index]
    attention, feed_forward = block.layer[0], block.layer[-1]
    dense = feed_forward.DenseReluDense
    if stack.layout == "fused":
        hidden_change = scales.hidden / old.hidden
        first_row = dense.wi.out_features // 2 if isinstance(dense, FusedGatedFeedForward) else 0
        _multiply(attention.SelfAttention.o, scales.attention_out / old.attention_out)
        _multiply(dense.wi, hidden_change, first_row)
        _multiply(dense.wo, scales.feed_forward_out / old.feed_forward_out / hidden_change)
        feed_forward.out_scale = scales.feed_forward_out
    else:
        attention.SelfAttention.scale = scales.attention_out
        dense.scale = feed_forward.out_scale = scales.hidden * scales.feed_forward_out
    attention.out_scale = scales.attention_out
    stack.scales = stack.scales.with_layer(index, scales)


def _multiply(linear: Any, factor: float, first_row: int = 0) -> None:
    """Multiplies a weight from a row on; into a new tensor, since the old one may be shared with others."""
    if isinstance(linear, LiveLinear):
        linear.up[first_row:] *= factor
        linear = linear.base
    if factor != 1:
        weight = linear.weight.detach().clone()
        weight[first_row:] *= factor
        linear.weight = torch.nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
