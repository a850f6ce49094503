"""The watch over an encoder's output: a value that is not finite never leaves.

In float16 the cause is found, the scale of the layer at fault is tightened, and the batch is run again. What no scale
can mend is an error that names the tensor.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import FLOAT16_MAX, LayerScales
from nai_t5_core.float16.maxima import LayerMaxima, observe, scales_for
from nai_t5_core.model.decoder import DecoderBlock
from nai_t5_core.model.encoder import Layout, T5EncoderStack
from nai_t5_core.model.encoder_block import EncoderBlock
from nai_t5_core.model.layers import FusedGatedFeedForward
from nai_t5_core.model.plain_twin import plain_twin
from nai_t5_core.model.precision import advice_beyond, is_finite

Result = TypeVar("Result", Tensor, list[Tensor])

# What a tightened scale leaves between the largest value seen and float16's largest number.
HEADROOM = 4.0

DAMAGED = "holds values that are not finite; the weights are damaged, or exceeded a dtype that they were cast to"


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
    out: Tensor = stack(*inputs, **options) if stack.guard else guard(stack, stack, *inputs, **options)
    return out


def guard(stack: T5EncoderStack, call: Callable[..., Result], *inputs: Any, **options: Any) -> Result:
    """``call(*inputs, **options)``, with the promise of :func:`encode_guarded`; gradients are recorded as ever.

    Args:
        call: gives hidden states of the stack from arguments of its call; of several, the last ones tell of all.
    """
    out = call(*inputs, **options)
    if _last_is_finite(out):
        return out
    changes: list[str] = []
    with stack.turns.change():
        # Another thread may have mended it while this one waited.
        while not _last_is_finite(out := call(*inputs, **options)):
            changes.append(_tighten_first_fault(stack, *inputs, **options))
    if changes:
        warn_of(changes, "save_scales()")
    return out


def _last_is_finite(out: Tensor | list[Tensor]) -> bool:
    return is_finite(out if isinstance(out, Tensor) else out[-1])


def warn_of(changes: list[str], remedy: str) -> None:
    """One :class:`ScaleTightenedWarning` for all that was tightened, at the caller of the guard."""
    text = f"float16 overflowed; {'; '.join(changes)}. These scales hold from now on; save them with {remedy}"
    warnings.warn(text, ScaleTightenedWarning, stacklevel=3)


@torch.no_grad()
def _tighten_first_fault(
    stack: T5EncoderStack, input_ids: Tensor | None = None, *inputs: Any, final_norm: bool = True, **options: Any
) -> str:
    """Finds the first layer that gives something not finite and tightens its scales; returns what was done."""
    embeddings, plan, packing = stack.prepare(input_ids, *inputs, **options)
    if not is_finite(embeddings):
        ids = None if input_ids is None else packing.pack(input_ids.to(embeddings.device))
        raise NotFiniteError(_embedding_fault(embeddings, ids))
    before = embeddings
    for index, after in enumerate(stack.encoder.residuals(embeddings, plan, stack.dtype)):
        if not is_finite(after):
            return _tighten(stack, index - 1, before, plan)
        before = after
    if final_norm and not is_finite(stack.encoder.final_layer_norm(torch.ones_like(before[:1]))):
        raise NotFiniteError(f"encoder.final_layer_norm.weight {DAMAGED}")
    raise NotFiniteError(f"the output itself exceeds {stack.dtype}; {advice_beyond(stack.dtype)}")


def _embedding_fault(embeddings: Tensor, ids: Tensor | None) -> str:
    """What is wrong with packed embeddings [tokens, d_model] of these ids."""
    if ids is None:
        return "inputs_embeds holds values that are not finite"
    is_faulty = ~embeddings.isfinite().all(dim=-1)
    rows = sorted(set(ids.to("cpu")[is_faulty.to("cpu")].tolist()))
    named = ", ".join(map(str, rows[:8])) + (", …" if rows[8:] else "")
    return f"shared.weight holds values that are not finite, in rows of tokens that the text has: {named}"


def _tighten(stack: T5EncoderStack, index: int, residual: Tensor, plan: Any) -> str:
    table = stack.encoder.bias_table(index, residual.device)
    if not is_finite(table):
        owner = index if stack.encoder.bias_per_layer else 0
        bias = "layer.0.SelfAttention.relative_attention_bias.weight"
        raise NotFiniteError(f"encoder.block.{owner}.{bias} {DAMAGED}")
    block: Any = stack.encoder.block[index]
    old = stack.scales.layers[index]
    # The true values of the layer, which may be beyond the compute dtype.
    twin = plain_twin(block, stack.layout, stack.config, old, residual.to(stack.dtype))
    refuse_damage(f"encoder.block.{index}.", twin, residual)
    seen = LayerMaxima()
    observe(twin, old, residual, (plan.layer(table.to(residual.dtype)),), seen)
    new = tighter_scales(f"layer {index}", old, seen, stack.dtype, stack.config)
    with stack.alterations.by("guard", lambda: stack.scales):
        rescale(stack, index, new)
    return describe_change(f"layer {index}", old, new, seen)


def refuse_damage(prefix: str, twin: EncoderBlock | DecoderBlock, residual: Tensor) -> None:
    """Raises a NotFiniteError that names the first weight of a block that is not finite."""
    ones = torch.ones_like(residual[:1])
    for number, layer in enumerate(twin.layer):
        for name, module in layer.named_modules(prefix=f"{prefix}layer.{number}"):
            if isinstance(module, nn.Linear) and not is_finite(module.weight):
                raise NotFiniteError(f"{name}.weight {DAMAGED}")
        norm: Any = layer.layer_norm
        if not is_finite(norm(ones)):
            raise NotFiniteError(f"{prefix}layer.{number}.layer_norm.weight {DAMAGED}")


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
        f"mend that; {advice_beyond(dtype)}"
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
    """The same for a block of an encoder or decoder that was built with the ``old`` scales.

    Raises:
        NotFiniteError: the layout is fused, and the weights are not there to be changed: they are offloaded.
    """
    attention, feed_forward = block.layer[0], block.layer[-1]
    dense = feed_forward.DenseReluDense
    if layout == "fused":
        _refuse_offloaded(block)
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


def _refuse_offloaded(block: Any) -> None:
    absent = [name for name, parameter in block.named_parameters() if parameter.is_meta]
    if absent:
        raise NotFiniteError(
            f"float16 overflowed, and the scales that would mend it belong into weights that are offloaded (such as "
            f"{absent[0]}): encode once before offloading, load with scales= of a calibration, or have "
            "layout='separate', or use bfloat16 or float32"
        )


def _multiply(linear: Any, factor: float, first_row: int = 0) -> None:
    """Multiplies a weight from a row on; into a new tensor, since the old one may be shared with others."""
    if factor == 1:
        return
    # Of what lies beside a weight, such as a live LoRA, or of a weight that is no parameter.
    while hasattr(linear, "multiply_rows"):
        linear.multiply_rows(factor, first_row)
        if not hasattr(linear, "base"):
            return
        linear = linear.base
    weight = linear.weight.detach().clone()
    weight[first_row:] *= factor
    linear.weight = torch.nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
