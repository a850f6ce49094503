"""LoRA merged into the weights of an encoder: any number at once, at any strength, and out again without a trace.

A LoRA is trained on the original weights. In the fused layout these are rows of a larger weight, whose columns hold the
norm before them and whose rows may hold a float16 scale; both are multiplied into the change as well. So a merged model
is as fast as it was, and equals the original one with its LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from nai_t5_core.config import encoder_tensors
from nai_t5_core.encoder import T5EncoderStack
from nai_t5_core.fuse import Recipe, folded_norm, fused_recipes, separate_recipes
from nai_t5_core.layers import residual_dtype
from nai_t5_core.lora_files import Lora, read_lora
from nai_t5_core.precision import DTYPES

LoraSource = Lora | str | Path


class HasStack(Protocol):
    """What is built around an encoder: TextEncoder, NAIT5EncoderModel."""

    @property
    def stack(self) -> T5EncoderStack: ...


@dataclass(frozen=True)
class _Kept:
    """A weight before any LoRA, the scales of its parts at that time, and what stands in its place."""

    original: Tensor
    scales: tuple[float, ...]
    merged: Tensor


class Loras:
    """The LoRAs of one encoder.

    >>> loras = Loras(encoder)                        # TextEncoder, T5EncoderStack or NAIT5EncoderModel
    >>> loras.add("style.safetensors", 0.8)
    'style'
    >>> loras.set_strength("style", 0.5)
    >>> loras.remove("style")                         # the weights are what they were, bit for bit

    The original of every changed weight is kept (it costs its memory once more, unless it is mapped from a file), and
    every change computes the weight anew from it, in float32: no rounding adds up, and when the last LoRA of a weight
    goes, the very original comes back. A model that was moved or cast meanwhile gets it moved and cast; float16 scales
    that were tightened meanwhile hold for it too.

    One such object per encoder: it is the one that knows the originals. Whatever saves, copies or gives back the
    encoder's weights (``restore_text_encoder``, too) takes them as they are: :meth:`clear` first if they should be
    without LoRA.
    """

    def __init__(self, model: T5EncoderStack | HasStack) -> None:
        self._stack = model if isinstance(model, T5EncoderStack) else model.stack
        self._loras: dict[str, tuple[Lora, float]] = {}
        self._kept: dict[str, _Kept] = {}

    @property
    def strengths(self) -> dict[str, float]:
        """Strength of each LoRA by name, in the order in which they were added."""
        return {name: strength for name, (_, strength) in self._loras.items()}

    def add(self, lora: LoraSource, strength: float = 1.0, name: str | None = None) -> str:
        """Merges a LoRA, beside those that are there.

        Args:
            lora: a file or folder, as :func:`nai_t5_core.lora_files.read_lora` takes it, or what that gave.
            strength: multiplies the change; 0 and negative numbers are allowed.
            name: for the other methods; by default that of the file.

        Returns:
            The name.

        Raises:
            CheckpointError: the file is unusable.
            ValueError: the name is taken, the strength is no number, the LoRA is for a T5 of other sizes, or the
                weights of this one are packed, quantised or offloaded. Nothing is changed then.
        """
        if not isinstance(lora, Lora):
            lora = read_lora(lora)
        name = lora.name if name is None else name
        if name in self._loras:
            raise ValueError(f"there is a LoRA {name!r} already; give another name=, or use set_strength")
        self._refuse_misfits(lora)
        self._apply({**self._loras, name: (lora, _checked(strength))}, lora.changes)
        return name

    def set_strength(self, name: str, strength: float) -> None:
        """Merges a LoRA at another strength.

        Raises:
            ValueError: there is no such LoRA, or the strength is no number; or see :meth:`add`.
        """
        lora = self._find(name)
        self._apply({**self._loras, name: (lora, _checked(strength))}, lora.changes)

    def remove(self, name: str) -> None:
        """Takes a LoRA out of the weights.

        Raises:
            ValueError: there is no such LoRA; or see :meth:`add`.
        """
        lora = self._find(name)
        self._apply({other: entry for other, entry in self._loras.items() if other != name}, lora.changes)

    def clear(self) -> None:
        """Takes all LoRAs out of the weights."""
        self._apply({}, [weight for lora, _ in self._loras.values() for weight in lora.changes])

    def _find(self, name: str) -> Lora:
        if name not in self._loras:
            raise ValueError(f"there is no LoRA {name!r}; there are: {', '.join(self._loras) or 'none'}")
        return self._loras[name][0]

    def _refuse_misfits(self, lora: Lora) -> None:
        shapes = encoder_tensors(self._stack.config)
        faults = [
            f"{name}: the model has no such weight"
            if name not in shapes
            else f"{name}: a change of shape {list(change.shape)} for a weight of shape {list(shapes[name])}"
            for name, change in lora.changes.items()
            if shapes.get(name) != change.shape
        ]
        if faults:
            listed = "\n  - ".join([*faults[:8], *([f"and {len(faults) - 8} more"] if faults[8:] else [])])
            raise ValueError(
                f"the LoRA {lora.name!r} is for another T5 than this {self._stack.config.kind}:\n  - {listed}"
            )

    @torch.no_grad()
    def _apply(self, loras: dict[str, tuple[Lora, float]], changed: Iterable[str]) -> None:
        """Makes these the LoRAs of the encoder; ``changed`` are the original weights that this is about."""
        stack = self._stack
        find_recipes = fused_recipes if stack.layout == "fused" else separate_recipes
        changed = set(changed)
        recipes = [r for r in find_recipes(stack.config, stack.scales) if not changed.isdisjoint(r.parts)]
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
                f"{recipe.target} is packed, quantised or wrapped, and takes no LoRA any more; load the model with "
                "optimize=False and without quantize, or give the LoRA to TextEncoder.from_pretrained(…, loras=…)"
            )
        if module.weight.is_meta:
            raise ValueError(f"{recipe.target} is offloaded; remove the offload hooks, merge, and offload again")
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
        for rows, old, new in zip(self._parts(weight, recipe), scales, recipe.scales, strict=True):
            rows.mul_(new / old)
        return weight

    def _parts(self, weight: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
        """The rows of each original weight in a fused one."""
        shapes = encoder_tensors(self._stack.config)
        return weight.split([shapes[name][0] for name in recipe.parts])

    def _merged(self, base: Tensor, recipe: Recipe) -> Tensor | None:
        """A weight with all its changes; None where it has none."""
        precision = residual_dtype(base.dtype)
        changes = [
            (index, change, strength * change.scale * recipe.scales[index])
            for index, name in enumerate(recipe.parts)
            for lora, strength in self._loras.values()
            if (change := lora.changes.get(name)) is not None and strength != 0
        ]
        if not changes:
            return None
        norm = None if recipe.norm is None else self._stack.get_buffer(folded_norm(recipe.norm))
        total = base.detach().to(precision, copy=True)
        rows = self._parts(total, recipe)
        for index, change, factor in changes:
            up, down = (tensor.to(total.device, precision) for tensor in (change.up, change.down))
            rows[index].addmm_(up, down if norm is None else down * norm.to(down), alpha=factor)
        return total.to(base.dtype)

    def __repr__(self) -> str:
        listed = ", ".join(f"{name}: {strength:g}" for name, strength in self.strengths.items())
        return f"Loras({listed or 'none'}; {len(self._kept)} weights changed)"


def _checked(strength: float) -> float:
    if not math.isfinite(strength):
        raise ValueError(f"strength={strength}; it must be a finite number")
    return float(strength)


def _parameter(weight: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=like.requires_grad)
