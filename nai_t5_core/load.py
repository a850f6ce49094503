"""From a model argument to a ready encoder.

The model is built on the meta device and its tensors are assigned one by one, so that the weights are never in memory
twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from nai_t5_core import native
from nai_t5_core.config import T5Config
from nai_t5_core.encoder import LAYOUTS, Layout, T5EncoderStack
from nai_t5_core.examine import Examination, ModelSource, examine, find_tokenizer
from nai_t5_core.formats import CheckpointError
from nai_t5_core.fuse import Recipe, cook, fused_recipes, separate_recipes
from nai_t5_core.keymaps import KeyMap
from nai_t5_core.layers import NoInit
from nai_t5_core.precision import is_finite, largest_absolute, resolve_device, resolve_dtype
from nai_t5_core.scales import StackScales, published_scales, scale_for, unscaled
from nai_t5_core.tokenizer import Tokenizer

ScalesChoice = StackScales | Literal["auto"]


@dataclass(frozen=True)
class LoadReport:
    """What a load did."""

    source: str
    format: str
    kind: str
    dtype: torch.dtype
    device: torch.device
    layout: Layout
    used: tuple[str, ...]
    ignored: dict[str, str]
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"{self.kind} from {self.source} ({self.format}): {len(self.used)} tensors used, "
            f"{len(self.ignored)} ignored, none missing; {self.layout} layout, {self.dtype}, {self.device}, "
            f"{self.seconds:.2f} s"
        ]
        for reason, names in by_reason(self.ignored).items():
            lines.append(f"  ignored {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") + f": {reason}")
        return "\n".join(lines)


def by_reason(ignored: dict[str, str]) -> dict[str, list[str]]:
    """The ignored names under each reason for ignoring them."""
    reasons: dict[str, list[str]] = {}
    for name, reason in ignored.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


@dataclass(frozen=True)
class LoadedEncoder:
    """A ready encoder with what came along with it."""

    stack: T5EncoderStack
    report: LoadReport
    examination: Examination

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer found beside or inside the weights. Read when it is asked for: that takes up to a second."""
        return find_tokenizer(self.examination)


def load_encoder(
    source: ModelSource = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    layout: Layout = "fused",
    subfolder: str = "",
    scales: ScalesChoice = "auto",
) -> T5EncoderStack:
    """Loads the encoder of a T5 from a hub id, a folder or a file; ``None`` is the tiny embedded model.

    Args:
        source: Hugging Face folder or id, safetensors (single or sharded), ``pytorch_model.bin``, a ComfyUI
            text-encoder file, a full encoder-decoder checkpoint, or a file made by ``nai-t5 convert``.
        dtype: ``"auto"``, a name or a torch dtype; see :func:`nai_t5_core.precision.resolve_dtype`.
        device: ``"auto"`` or anything torch takes.
        layout: ``"fused"`` or ``"separate"``; see :class:`nai_t5_core.encoder.T5EncoderStack`.
        subfolder: the text encoder's folder in a diffusers pipeline.
        scales: powers of two that keep float16 in range, see :mod:`nai_t5_core.scales`. ``"auto"``: those in the
            checkpoint; else, in float16, those published for a model of this size, or none.

    Returns:
        The encoder in evaluation mode.

    Raises:
        CheckpointError: a ValueError that says what is wrong with the checkpoint, all faults at once.
        ValueError: an unknown dtype, device or layout, or scales for another number of layers.
    """
    return load(source, dtype, device, layout, subfolder, scales).stack


def load(
    source: ModelSource = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    layout: Layout = "fused",
    subfolder: str = "",
    scales: ScalesChoice = "auto",
) -> LoadedEncoder:
    """As :func:`load_encoder`, with the tokenizer found beside or inside the weights, and a report."""
    started = time.perf_counter()
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; allowed: {', '.join(LAYOUTS)}")
    place = resolve_device(device)
    model_dtype = resolve_dtype(dtype, place)
    examination = examine(source, subfolder)
    stack, recipes = assemble(examination, model_dtype, place, layout, scales)
    report = LoadReport(
        source=examination.checkpoint.source,
        format=examination.checkpoint.format,
        kind=stack.config.kind,
        dtype=model_dtype,
        device=place,
        layout=layout,
        used=_used_by(recipes, examination.keymap),
        ignored=_ignored_by_encoder(examination),
        seconds=time.perf_counter() - started,
    )
    return LoadedEncoder(stack, report, examination)


def assemble(
    examination: Examination,
    dtype: torch.dtype,
    device: torch.device,
    layout: Layout = "fused",
    scales: ScalesChoice = "auto",
    ops: Any = NoInit,
    release: Callable[[tuple[str, ...]], None] = lambda names: None,
) -> tuple[T5EncoderStack, list[Recipe]]:
    """The encoder of an examined checkpoint, in evaluation mode, and how its tensors were made.

    Args:
        dtype, device, layout, scales: as for :func:`load_encoder`, but resolved.
        ops: the namespace of the model's Linear and Embedding classes.
        release: called with the names of originals that have been read for the last time.

    Raises:
        CheckpointError: the checkpoint has faults, or a weight exceeds float16.
    """
    examination.refuse_faults()
    config = examination.config.encoder_only()
    chosen = choose_scales(examination, dtype, scales)
    stack = T5EncoderStack(config, layout, ops, chosen, device="meta", dtype=dtype)
    recipes, read = _recipes(examination, config, layout, chosen)
    tensors = {}
    for recipe in recipes:
        tensors[recipe.target] = _checked(recipe, cook(recipe, read, dtype)).to(device)
        release(recipe.parts)
    stack.load_state_dict(tensors, assign=True)
    return stack.eval(), recipes


def choose_scales(examination: Examination, dtype: torch.dtype, wanted: ScalesChoice = "auto") -> StackScales | None:
    """The encoder's scales for a model in ``dtype``; None where nothing is to be scaled.

    An embedding table beyond float16's range gets a scale of its own, since its largest value is known.
    """
    config = examination.config
    scales = examination.scales if wanted == "auto" else wanted
    if scales is None and dtype == torch.float16:
        scales = published_scales(config)
    if dtype != torch.float16 or (scales is not None and scales.embedding < 1):
        return scales
    info = examination.checkpoint.tensors[examination.keymap.names["shared.weight"]]
    if info.dtype in (torch.float32, torch.float64, torch.bfloat16):
        embedding = scale_for(largest_absolute(examination.read("shared.weight")), headroom=1)
        if embedding < 1:
            return replace(scales or unscaled(config.num_layers), embedding=embedding)
    return scales


def _recipes(
    examination: Examination, config: T5Config, layout: Layout, scales: StackScales | None
) -> tuple[list[Recipe], Callable[[str], Tensor]]:
    """How each tensor of the encoder is made from this checkpoint, and what reads its ingredients."""
    if layout == "separate":
        return separate_recipes(config, scales), examination.read
    recipes = fused_recipes(config, scales)
    if examination.is_native and scales == examination.scales:
        return native.stored(recipes), examination.checkpoint.read
    return recipes, examination.read


def _checked(recipe: Recipe, tensor: Tensor) -> Tensor:
    """Refuses a weight that float16 has made infinite; what the guard would find later, it could not mend."""
    if tensor.dtype == torch.float16 and not recipe.is_plain and not is_finite(tensor):
        raise CheckpointError(
            f"{recipe.target} has values that are not finite in {tensor.dtype}: the weights are damaged, or exceed its "
            "range; use bfloat16 or float32"
        )
    return tensor


def _used_by(recipes: list[Recipe], keymap: KeyMap) -> tuple[str, ...]:
    names = [name for recipe in recipes for name in recipe.originals]
    return tuple(dict.fromkeys([*names, *(keymap.scales[name] for name in names if name in keymap.scales)]))


def _ignored_by_encoder(examination: Examination) -> dict[str, str]:
    keymap = examination.keymap
    unused = {
        full: "belongs to the decoder"
        for name, full in [*keymap.names.items(), *keymap.scales.items()]
        if name.startswith(("decoder.", "lm_head."))
    }
    return keymap.ignored | unused
