"""The watch over an encoder's output: a value that is not finite never leaves.

In float16 the cause is found, the scale of the layer at fault is tightened, and the batch is run again. What no scale
can mend is an error that names the tensor.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.config import T5Config
from nai_t5_core.decoder import DecoderBlock
from nai_t5_core.encoder import Layout, T5EncoderStack
from nai_t5_core.encoder_block import EncoderBlock
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
        warn_of(changes, "save_scales()")
    return out


def warn_of(changes: list[str], remedy: str) -> None:
    """One :class:`ScaleTightenedWarning` for all that was tightened, at the caller of the guard."""
    text = f"float16 overflowed; {'; '.join(changes)}. These scales hold from now on; save them with {remedy}"
    warnings.warn(text, ScaleTightenedWarning, stacklevel=3)


def is_finite(values: Tensor) -> bool:
    """Whether a tensor is without NaN and infinity: one sum, in a precision that it cannot overflow."""
    return bool(values.sum(dtype=residual_dtype(values.dtype)).isfinite())


def _tighten_first_fault(stack: T5EncoderStack, *inputs: Any, **options: Any) -> str:
    """Finds the first layer that gives something not finite and tightens its scales; returns what was done."""
    embeddings, plan, packing = stack.prepare(*inputs, **options)
    if not is_finite(embeddings):
        input_ids = options.get("input_ids", inputs[0] if inputs else None)
        if input_ids is not None:
            _refuse_rows(packing.pack(input_ids.to(embeddings.device)), embeddings)
        raise NotFiniteError(f"{culprit(stack, 'shared') or 'inputs_embeds'} holds values that are not finite")
    before = embeddings
    for index, after in enumerate(stack.encoder.residuals(embeddings, plan, stack.dtype)):
        if not is_finite(after):
            return _tighten(stack, index - 1, before, plan)
        before = after
    found = culprit(stack, "encoder.final_layer_norm")
    raise NotFiniteError(
        f"{found} holds values that are not finite"
        if found
        else f"the output itself exceeds {stack.dtype}; use bfloat16 or float32"
    )


def _refuse_rows(ids: Tensor, embeddings: Tensor) -> None:
    """Names the tokens whose embeddings are not finite: ids [tokens], embeddings [tokens, d_model]."""
    rows = ids[~embeddings.isfinite().all(-1)].unique().tolist()
    named = ", ".join(map(str, rows[:8])) + (", …" if rows[8:] else "")
    raise NotFiniteError(
        f"shared.weight holds values that are not finite, in rows of tokens that the text has: {named}"
    )


def culprit(model: nn.Module, prefix: str) -> str | None:
    """The first weight under a prefix that is not finite."""
    tensors = model.state_dict().items()
    return next((name for name, tensor in tensors if name.startswith(prefix) and not tensor.isfinite().all()), None)


def _tighten(stack: T5EncoderStack, index: int, residual: Tensor, plan: Any) -> str:
    found = culprit(stack, f"encoder.block.{index}.")
    if found:
        raise NotFiniteError(f"{found} holds values that are not finite; the weights are damaged")
    old = stack.scales.layers[index]
    # The true values of the layer, which may be beyond the compute dtype.
    attend = plan.layer(stack.encoder.bias_table(index).to(residual.dtype))
    block = copy.deepcopy(stack.encoder.block[index]).float()
    assert isinstance(block, EncoderBlock)
    seen = LayerMaxima()
    observe(block, old, residual, (attend,), seen)
    new = tighter_scales(f"layer {index}", old, seen, stack.dtype, stack.config)
    rescale(stack, index, new)
    return describe_change(f"layer {index}", old, new, seen)


def tighter_scales(
    where: str, old: LayerScales, seen: LayerMaxima, dtype: torch.dtype, config: T5Config
) -> LayerScales:
    """The scales that bring a layer with these maxima into float16.

    Raises:
        NotFiniteError: there are none; the message says what exceeds the dtype.
    """
    limit = torch.finfo(dtype).max
    # NaN is what attention gives where its logits overflow.
    if all(math.isfinite(largest) for largest in seen.maxima.values()) and dtype == torch.float16:
        wanted = scales_for(seen, HEADROOM, can_scale_hidden=config.can_scale_hidden)
        new = LayerScales(**{name: min(scale, getattr(wanted, name)) for name, scale in asdict(old).items()})
        if new != old:
            return new
    beyond = [f"{name} reaches {largest:.3g}" for name, largest in seen.maxima.items() if not largest <= limit]
    raise NotFiniteError(
        f"{where} exceeds {dtype} (its {', its '.join(beyond) or 'logits overflow'}), and no scale can "
        "mend that; use bfloat16 or float32"
    )


def describe_change(where: str, old: LayerScales, new: LayerScales, seen: LayerMaxima) -> str:
    """What was tightened, in words."""
    changed = [name for name in asdict(old) if getattr(old, name) != getattr(new, name)]
    return f"{where}: " + ", ".join(
        f"{name} reaches {seen.maxima[name]:.3g} (limit {FLOAT16_MAX:.0f}), scale {getattr(old, name):g} "
        f"tightened to {getattr(new, name):g}"
        for name in changed
    )


@torch.no_grad()
def rescale(stack: T5EncoderStack, index: int, scales: LayerScales) -> None:
    """Gives a layer other scales. In the fused layout its weights are replaced by multiples of them."""
    rescale_block(stack.encoder.block[index], stack.layout, stack.scales.layers[index], scales)
    stack.scales = stack.scales.with_layer(index, scales)


def rescale_block(block: Any, layout: Layout, old: LayerScales, new: LayerScales) -> None:
    """The same for a block of an encoder or decoder that was built with the ``old`` scales."""
    attention, feed_forward = block.layer[0], block.layer[-1]
    dense = feed_forward.DenseReluDense
    if layout == "fused":
        hidden_change = new.hidden / old.hidden
        first_row = dense.wi.out_features // 2 if isinstance(dense, FusedGatedFeedForward) else 0
        _multiply(attention.SelfAttention.o, new.attention_out / old.attention_out)
        _multiply(dense.wi, hidden_change, first_row)
        _multiply(dense.wo, new.feed_forward_out / old.feed_forward_out / hidden_change)
        feed_forward.out_scale = new.feed_forward_out
    else:
        attention.SelfAttention.scale = new.attention_out
        dense.scale = feed_forward.out_scale = new.hidden * new.feed_forward_out
    attention.out_scale = new.attention_out
    if isinstance(block, DecoderBlock):
        cross: Any = block.layer[1]
        if layout == "fused":
            _multiply(cross.EncDecAttention.o, new.cross_attention_out / old.cross_attention_out)
        else:
            cross.EncDecAttention.scale = new.cross_attention_out
        cross.out_scale = new.cross_attention_out


def _multiply(linear: Any, factor: float, first_row: int = 0) -> None:
    """Multiplies a weight from a row on; into a new tensor, since the old one may be shared with others."""
    if isinstance(linear, LiveLinear):
        linear.up[first_row:] *= factor
        linear = linear.base
    if factor != 1:
        weight = linear.weight.detach().clone()
        weight[first_row:] *= factor
        linear.weight = torch.nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
