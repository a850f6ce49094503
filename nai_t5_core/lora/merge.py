"""Weights with changes merged into them, each computed from its original, which is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nai_t5_core.facts.config import encoder_tensors
from nai_t5_core.lora.changes import Change
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.layers import FoldedRMSNorm, RMSNorm, residual_dtype
from nai_t5_core.model.precision import DTYPES
from nai_t5_core.weights.fuse import Recipe, folded_norm

# Of the present LoRAs, what they add to an original weight by name, each with its factor.
ChangesOf = Callable[[str], list[tuple[Change, float]]]
_KINDS = (nn.Linear, nn.Embedding, RMSNorm, FoldedRMSNorm)


@dataclass(frozen=True)
class _Kept:
    """A weight before any LoRA, the scales of its parts at that time, and what stands in its place."""

    original: Tensor
    scales: tuple[float, ...]
    merged: Tensor


class Merger:
    """The weights of one encoder, with what is merged into them at present.

    Where a norm is multiplied into a weight and is changed itself, the weight's columns are multiplied by what the norm
    has become over what it was.
    """

    def __init__(self, stack: T5EncoderStack) -> None:
        self._stack = stack
        self._kept: dict[str, _Kept] = {}

    @property
    def count(self) -> int:
        """How many weights are not what they were."""
        return len(self._kept)

    def refuse(self, recipe: Recipe, changes_of: ChangesOf) -> None:
        """Raises a ValueError if a weight cannot be changed, before anything is."""
        module, name = self._place(recipe)
        weight = getattr(module, name, None)
        if not isinstance(module, _KINDS) or weight is None or weight.dtype not in DTYPES.values():
            raise ValueError(
                f"{recipe.target} is packed, quantised or wrapped, and takes no LoRA any more; use LiveLoras, or load "
                "the model with optimize=False and without quantize (a quantised file with unpack=True), or give the "
                "LoRA to TextEncoder.from_pretrained(…, loras=…)"
            )
        if weight.is_meta:
            raise ValueError(
                f"{recipe.target} is offloaded; use LiveLoras, or remove the offload hooks, merge, and offload again"
            )
        kept = self._kept.get(recipe.target)
        if kept is not None and kept.merged is not weight and kept.scales == recipe.scales:
            raise ValueError(
                f"{recipe.target} was replaced by others after a LoRA was merged into it; load the model again, and "
                "make one Loras object for it"
            )
        if recipe.norm is not None:
            norm_ratio(recipe.norm, *self._norms(recipe.norm, changes_of))

    @torch.no_grad()
    def renew(self, recipe: Recipe, changes_of: ChangesOf) -> None:
        """Computes a weight from its original and the present changes; without any, it is the original again."""
        module, name = self._place(recipe)
        present = getattr(module, name)
        kept = self._kept.pop(recipe.target, None)
        original, scales = (present, recipe.scales) if kept is None else (kept.original, kept.scales)
        base = self._rescaled(original, scales, recipe).to(present.device, present.dtype)
        merged = self._merged(base, recipe, changes_of)
        if merged is None:
            setattr(module, name, base if base is original else _like(base, original))
            return
        setattr(module, name, _like(merged, original))
        self._kept[recipe.target] = _Kept(original, scales, getattr(module, name))

    def _place(self, recipe: Recipe) -> tuple[nn.Module | None, str]:
        """The module that has a weight, and its name there."""
        path, _, name = recipe.target.rpartition(".")
        try:
            return self._stack.get_submodule(path), name
        except AttributeError:
            return None, name

    def _rescaled(self, original: Tensor, scales: tuple[float, ...], recipe: Recipe) -> Tensor:
        """An original under the present scales; itself where they are the same."""
        if scales == recipe.scales:
            return original
        weight = original.detach().clone()
        for rows, old, new in zip(weight.split(row_counts(self._stack, recipe)), scales, recipe.scales, strict=True):
            rows.mul_(new / old)
        return weight

    def _merged(self, base: Tensor, recipe: Recipe, changes_of: ChangesOf) -> Tensor | None:
        """A weight with all its changes; None where it has none."""
        changes = [
            (index, change, factor * scale)
            for index, (part, scale) in enumerate(zip(recipe.parts, recipe.scales, strict=True))
            for change, factor in changes_of(part)
        ]
        if not changes and not (recipe.norm and changes_of(recipe.norm)):
            return None
        total = base.detach().to(residual_dtype(base.dtype), copy=True)
        columns = None
        if recipe.norm is not None:
            before, columns = self._norms(recipe.norm, changes_of)
            if before is not columns:
                total *= norm_ratio(recipe.norm, before, columns).to(total)
        rows = total.split(row_counts(self._stack, recipe))
        for index, change, factor in changes:
            change.add_to(rows[index], factor, columns)
        return total.to(base.dtype)

    def _norms(self, norm: str, changes_of: ChangesOf) -> tuple[Tensor, Tensor]:
        """The weight of a folded norm: the original, and with the present changes; the same tensor without any."""
        target = folded_norm(norm)
        before = self._kept[target].original if target in self._kept else self._stack.get_buffer(target)
        return before, changed(before, changes_of(norm))


def changed(weight: Tensor, changes: list[tuple[Change, float]]) -> Tensor:
    """A weight with changes added to it, in float32; itself where there are none."""
    if not changes:
        return weight
    total = weight.detach().to(residual_dtype(weight.dtype), copy=True)
    for change, factor in changes:
        change.add_to(total, factor)
    return total


def norm_ratio(name: str, before: Tensor, after: Tensor) -> Tensor:
    """What the columns that a norm's weight was multiplied into are to be multiplied by, when it is changed.

    Raises:
        ValueError: a weight of zero has wiped a column out, and is to become another.
    """
    is_lost = (before == 0) & (after.to(before) != 0)
    if bool(is_lost.any()):
        raise ValueError(
            f"the LoRA changes {name}, which has zeros, and the fused layout has lost what they hide; load the model "
            "with layout='separate' for this LoRA"
        )
    return torch.where(before == 0, 1, after.to(before) / before)


def row_counts(stack: T5EncoderStack, recipe: Recipe) -> list[int]:
    """Rows of each original in a weight."""
    shapes = encoder_tensors(stack.config)
    return [shapes[name][0] for name in recipe.parts]


def _like(weight: Tensor, original: Tensor) -> Tensor:
    if isinstance(original, nn.Parameter):
        return nn.Parameter(weight, requires_grad=original.requires_grad)
    return weight
