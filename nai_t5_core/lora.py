"""LoRA merged into the weights of an encoder: any number at once, at any strength, and out again without a trace.

A LoRA is trained on the original weights. In the fused layout these are rows of a larger weight, whose columns hold the
norm before them and whose rows may hold a float16 scale; both are multiplied into the change as well. So a merged model
is as fast as it was, and equals the original one with its LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nai_t5_core.encoder import T5EncoderStack
from nai_t5_core.fuse import Recipe, folded_norm
from nai_t5_core.layers import residual_dtype
from nai_t5_core.lora_set import HasStack, LoraSet, NamedLoras
from nai_t5_core.precision import DTYPES


@dataclass(frozen=True)
class _Kept:
    """A weight before any LoRA, the scales of its parts at that time, and what stands in its place."""

    original: Tensor
    scales: tuple[float, ...]
    merged: Tensor


class Loras(LoraSet):
    """The LoRAs of one encoder, merged into its weights.

    >>> loras = Loras(encoder)                        # TextEncoder, T5EncoderStack or NAIT5EncoderModel
    >>> loras.add("style.safetensors", 0.8)
    'style'
    >>> loras.set_strength("style", 0.5)
    >>> loras.remove("style")                         # the weights are what they were, bit for bit

    The original of every changed weight is kept (it costs its memory once more, unless it is mapped from a file), and
    every change computes the weight anew from it, in float32: no rounding adds up, and when the last LoRA of a weight
    goes, the very original comes back. A model that was moved or cast meanwhile gets it moved and cast; float16 scales
    that were tightened meanwhile hold for it too.

    Weights that are packed, quantised or offloaded can't be changed; :class:`nai_t5_core.lora_live.LiveLoras` needs no
    change of weights.

    One such object per encoder: it is the one that knows the originals. Whatever saves, copies or gives back the
    encoder's weights (``restore_text_encoder``, too) takes them as they are: :meth:`clear` first if they should be
    without LoRA.
    """

    def __init__(self, model: T5EncoderStack | HasStack) -> None:
        super().__init__(model)
        self._kept: dict[str, _Kept] = {}

    @torch.no_grad()
    def _apply(self, loras: NamedLoras, changed: Iterable[str]) -> None:
        recipes = self._recipes(changed)
        # All are looked at before the first is changed.
        linears = [self._linear(recipe) for recipe in recipes]
        self._loras = loras
        for recipe, linear in zip(recipes, linears, strict=True):
            self._renew(recipe, linear)

    def _linear(self, recipe: Recipe) -> nn.Linear:
        """The module whose weight a recipe makes, if the weight is there and is what this object has made of it."""
        try:
            module = self._stack.get_submodule(recipe.target.removesuffix(".weight"))
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear) or module.weight.dtype not in DTYPES.values():
            raise ValueError(
                f"{recipe.target} is packed, quantised or wrapped, and takes no LoRA any more; use LiveLoras, or load "
                "the model with optimize=False and without quantize, or give the LoRA to "
                "TextEncoder.from_pretrained(…, loras=…)"
            )
        if module.weight.is_meta:
            raise ValueError(
                f"{recipe.target} is offloaded; use LiveLoras, or remove the offload hooks, merge, and offload again"
            )
        kept = self._kept.get(recipe.target)
        if kept is not None and kept.merged is not module.weight and kept.scales == recipe.scales:
            raise ValueError(
                f"{recipe.target} was replaced by others after a LoRA was merged into it; load the model again, and "
                "make one Loras object for it"
            )
        return module

    def _renew(self, recipe: Recipe, linear: nn.Linear) -> None:
        """Computes a weight from its original and the present LoRAs."""
        kept = self._kept.pop(recipe.target, None)
        original, scales = (linear.weight, recipe.scales) if kept is None else (kept.original, kept.scales)
        base = self._rescaled(original, scales, recipe).to(linear.weight.device, linear.weight.dtype)
        merged = self._merged(base, recipe)
        if merged is None:
            linear.weight = base if base is original else _parameter(base, original)
            return
        linear.weight = _parameter(merged, original)
        self._kept[recipe.target] = _Kept(original, scales, linear.weight)

    def _rescaled(self, original: Tensor, scales: tuple[float, ...], recipe: Recipe) -> Tensor:
        """An original under the present scales; itself where they are the same."""
        if scales == recipe.scales:
            return original
        weight = original.detach().clone()
        for rows, old, new in zip(weight.split(self._row_counts(recipe)), scales, recipe.scales, strict=True):
            rows.mul_(new / old)
        return weight

    def _merged(self, base: Tensor, recipe: Recipe) -> Tensor | None:
        """A weight with all its changes; None where it has none."""
        changes = list(self._changes(recipe))
        if not changes:
            return None
        norm = None if recipe.norm is None else self._stack.get_buffer(folded_norm(recipe.norm))
        precision = residual_dtype(base.dtype)
        total = base.detach().to(precision, copy=True)
        rows = total.split(self._row_counts(recipe))
        for index, change, factor in changes:
            up, down = (tensor.to(total.device, precision) for tensor in (change.up, change.down))
            rows[index].addmm_(up, down if norm is None else down * norm.to(down), alpha=factor)
        return total.to(base.dtype)

    def _changed_count(self) -> int:
        return len(self._kept)


def _parameter(weight: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=like.requires_grad)
