"""From a model argument to a ready encoder, or a whole T5.

The model is built on the meta device and its tensors are assigned one by one, so that the weights are never in memory
twice.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.choose import run_in_place
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import StackScales, published_scales, scale_for, unscaled
from nai_t5_core.float16.guard import guard
from nai_t5_core.generation.t5 import T5
from nai_t5_core.model.attention_choice import AttentionChoice, missing_for_flex, refuse_unsupported
from nai_t5_core.model.encoder import Layout, T5EncoderStack
from nai_t5_core.model.layers import NoInit
from nai_t5_core.tokenizer import Tokenizer
from nai_t5_core.weights import native
from nai_t5_core.weights.chosen import ScalesChoice, given_or_stored, place_for, told_scales
from nai_t5_core.weights.examine import Examination, ModelSource, decoder_faults, examine, find_tokenizer, settle_head
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.fuse import Recipe, Workbench, fused_recipes, originals, separate_recipes
from nai_t5_core.weights.held_weights import held_modules, refuse_scales, refuse_to_keep, that_stay
from nai_t5_core.weights.held_weights import place as put_in_place
from nai_t5_core.weights.keymaps import KeyMap
from nai_t5_core.weights.load_report import LoadReport
from nai_t5_core.weights.ranges import cook_within_range
from nai_t5_core.weights.scales_file import read_decoder_scales


@dataclass(frozen=True)
class _Loaded:
    """What comes along with a model."""

    report: LoadReport
    examination: Examination

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer found beside or inside the weights. Read when it is asked for: that takes up to a second."""
        return find_tokenizer(self.examination)


@dataclass(frozen=True)
class LoadedEncoder(_Loaded):
    """A ready encoder with what came along with it."""

    stack: T5EncoderStack


@dataclass(frozen=True)
class LoadedT5(_Loaded):
    """A ready T5 with what came along with it."""

    model: T5


def load_encoder(
    source: ModelSource = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    layout: Layout = "fused",
    subfolder: str = "",
    scales: ScalesChoice = "auto",
    attention: AttentionChoice = "auto",
    unpack: bool = False,
) -> T5EncoderStack:
    """Loads the encoder of a T5 from a hub id, a folder or a file; ``None`` is the tiny embedded model.

    What it gives is finite or an error, see :func:`nai_t5_core.float16.guard.guard`; ``stack.guard = None`` switches
    that off, and with it the wait for a device at the end of every call.

    Args:
        source: Hugging Face folder or id, safetensors (single or sharded), ``pytorch_model.bin``, GGUF, a ComfyUI
            text-encoder file, a full encoder-decoder checkpoint, a bare ``T5Stack``, the UMT5 of Wan's own repository,
            or a file made by ``nai-t5 convert``.
        dtype: ``"auto"``, a name or a torch dtype; see :func:`nai_t5_core.backends.auto_dtype.resolve_dtype`.
        device: ``"auto"`` or anything torch takes.
        layout: ``"fused"`` or ``"separate"``; see :class:`nai_t5_core.model.encoder.T5EncoderStack`.
        subfolder: the text encoder's folder in a diffusers pipeline.
        scales: powers of two that keep float16 in range, see :mod:`nai_t5_core.facts.scales`. ``"auto"``: those in the
            checkpoint; else, in float16, those published for a model of this size, or none. A path: those in a file
            that ``save_scales`` wrote.
        attention: ``"auto"``, ``"flex"`` or ``"sdpa"``; see :class:`nai_t5_core.model.encoder.T5EncoderStack`. Where
            the compiler that flex needs is missing, a warning says so, and the model has ``"sdpa"``.
        unpack: make numbers in ``dtype`` of a quantised checkpoint's weights while it is loaded. Else they stay as they
            lie in the file, which memory then holds about once, and every call makes numbers of them.

    Returns:
        The encoder in evaluation mode.

    Raises:
        CheckpointError: a ValueError that says what is wrong with the checkpoint, all faults at once.
        ValueError: an unknown dtype, device, layout or attention, a model that flex cannot compute, or scales for
            another number of layers.
    """
    return load(source, dtype, device, layout, subfolder, scales, attention, unpack).stack


def load(
    source: ModelSource = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    layout: Layout = "fused",
    subfolder: str = "",
    scales: ScalesChoice = "auto",
    attention: AttentionChoice = "auto",
    unpack: bool = False,
    by_way_of_host: bool = False,
) -> LoadedEncoder:
    """As :func:`load_encoder`, with the tokenizer found beside or inside the weights, and a report.

    Args:
        by_way_of_host: leave the weights in the host's memory, for one who brings them to the device layer by layer.
    """
    started = time.perf_counter()
    place, model_dtype = place_for(device, dtype, layout, attention)
    examination = examine(source, subfolder)
    if attention == "flex":
        attention = _flex_or_sdpa(place, model_dtype, examination.config.d_kv)
    where = torch.device("cpu") if by_way_of_host else place
    stack, recipes = assemble(examination, model_dtype, where, layout, scales, unpack=unpack)
    stack.attention = attention
    stack.guard = guard
    report = replace(_report(examination, stack, recipes, started), device=place)
    return LoadedEncoder(report, examination, stack)


def assemble(
    examination: Examination,
    dtype: torch.dtype,
    device: torch.device,
    layout: Layout = "fused",
    scales: ScalesChoice = "auto",
    ops: Any = NoInit,
    release: Callable[[tuple[str, ...]], None] = lambda names: None,
    unpack: bool = False,
) -> tuple[T5EncoderStack, list[Recipe]]:
    """The encoder of an examined checkpoint, in evaluation mode, and how its tensors were made.

    Args:
        dtype, device, layout, scales, unpack: as for :func:`load_encoder`, but resolved.
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
    refuse_scales(examination, originals(recipes))
    staying = [] if unpack else that_stay(recipes, examination)
    refuse_to_keep(staying, examination, device)
    held = held_modules(staying, examination, dtype, device)
    made = [recipe for recipe in recipes if recipe not in staying]
    absent = stack.load_state_dict(_tensors(made, read, dtype, device, release), strict=False, assign=True)
    assert {f"{path}.weight" for path in held} == set(absent.missing_keys) and not absent.unexpected_keys
    put_in_place(stack, held)
    return run_in_place(stack.eval()), recipes


def refuse_before_assembly(
    examination: Examination, dtype: torch.dtype, layout: Layout, scales: ScalesChoice, unpack: bool = False
) -> None:
    """Raises what :func:`assemble` would raise, for one who cannot go back when weights are released on the way.

    Whether float16 holds a joined weight shows only when it is made: each is made, and let go.
    """
    examination.refuse_faults()
    config = examination.config.encoder_only()
    chosen = choose_scales(examination, dtype, scales)
    T5EncoderStack(config, layout, NoInit, chosen, device="meta", dtype=dtype)
    recipes, read = _recipes(examination, config, layout, chosen)
    refuse_scales(examination, originals(recipes))
    staying = [] if unpack else that_stay(recipes, examination)
    held_modules(staying, examination, dtype, torch.device("cpu"))
    workbench = Workbench()
    for recipe in recipes if dtype == torch.float16 else ():
        if recipe not in staying:
            cook_within_range(recipe, read, dtype, workbench)


def load_t5(
    source: ModelSource = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    layout: Layout = "fused",
    subfolder: str = "",
    scales: ScalesChoice = "auto",
    decoder_scales: ScalesChoice = "auto",
) -> T5:
    """Loads a T5 with its decoder; arguments are those of :func:`load_encoder`.

    Args:
        decoder_scales: as ``scales``, for the decoder. Where ``scales`` is a path, ``"auto"`` takes those in the same
            file.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: as :func:`load_encoder`, and where there is no decoder.
        ValueError: as :func:`load_encoder`.
    """
    return load_whole(source, dtype, device, layout, subfolder, scales, decoder_scales).model


def load_whole(
    source: ModelSource = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    layout: Layout = "fused",
    subfolder: str = "",
    scales: ScalesChoice = "auto",
    decoder_scales: ScalesChoice = "auto",
) -> LoadedT5:
    """As :func:`load_t5`, with the tokenizer found beside or inside the weights, and a report."""
    started = time.perf_counter()
    place, model_dtype = place_for(device, dtype, layout, has_decoder=True)
    examination = examine(source, subfolder)
    if examination.config.num_decoder_layers == 0:
        raise CheckpointError(
            f"{examination.checkpoint.source} has no decoder: it is the encoder alone, which cannot generate text; "
            "give the whole model"
        )
    settle_head(examination)
    examination.faults += decoder_faults(examination)
    examination.refuse_faults()
    config = examination.config
    chosen = choose_scales(examination, model_dtype, scales)
    if decoder_scales == "auto" and not isinstance(scales, StackScales):
        decoder_scales = scales
    chosen_for_decoder = choose_decoder_scales(examination, model_dtype, decoder_scales)
    model = T5(config, layout, NoInit, chosen, chosen_for_decoder, device="meta", dtype=model_dtype)
    recipes, read = _recipes(examination, config, layout, chosen, chosen_for_decoder)
    refuse_scales(examination, originals(recipes))
    model.assign(_tensors(recipes, read, model_dtype, place))
    return LoadedT5(_report(examination, run_in_place(model.eval()), recipes, started), examination, model)


def _tensors(
    recipes: list[Recipe],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    release: Callable[[tuple[str, ...]], None] = lambda names: None,
) -> dict[str, Tensor]:
    tensors, workbench = {}, Workbench()
    for recipe in recipes:
        tensors[recipe.target] = cook_within_range(recipe, read, dtype, workbench).to(device)
        release(recipe.parts)
    return tensors


def _report(examination: Examination, model: T5EncoderStack | T5, recipes: list[Recipe], started: float) -> LoadReport:
    used = _used_by(recipes, examination.keymap)
    return LoadReport(
        source=examination.checkpoint.source,
        format=examination.checkpoint.format,
        kind=model.config.kind,
        dtype=model.dtype,
        device=model.device,
        layout=model.layout,
        used=used,
        ignored=_ignored(examination, used),
        seconds=time.perf_counter() - started,
    )


def _flex_or_sdpa(device: torch.device, dtype: torch.dtype, d_kv: int) -> AttentionChoice:
    refuse_unsupported(device, dtype, d_kv)
    missing = missing_for_flex(device)
    if missing is None:
        return "flex"
    warnings.warn(f"attention='flex' is not possible here: {missing}. The model uses 'sdpa'", stacklevel=4)
    return "sdpa"


def choose_scales(examination: Examination, dtype: torch.dtype, wanted: ScalesChoice = "auto") -> StackScales | None:
    """The encoder's scales for a model in ``dtype``; None where nothing is to be scaled.

    An embedding table beyond float16's range gets a scale of its own, since its largest value is known.
    """
    config, scales = examination.config, told_scales(examination, dtype, wanted)
    if dtype != torch.float16 or (scales is not None and scales.embedding < 1):
        return scales
    info = examination.checkpoint.tensors[examination.keymap.names["shared.weight"]]
    is_wider = info.dtype in (torch.float32, torch.float64, torch.bfloat16)
    if is_wider or "shared.weight" in examination.keymap.scales or "shared.weight" in examination.quantised:
        embedding = scale_for(examination.largest("shared.weight"), headroom=1)
        if embedding < 1:
            return replace(scales or unscaled(config.num_layers), embedding=embedding)
    return scales


def choose_decoder_scales(
    examination: Examination, dtype: torch.dtype, wanted: ScalesChoice = "auto"
) -> StackScales | None:
    """The decoder's scales for a model in ``dtype``; None where nothing is to be scaled."""
    scales = given_or_stored(wanted, examination.decoder_scales, read_decoder_scales)
    return published_scales(examination.config, "decoder") if scales is None and dtype == torch.float16 else scales


def _recipes(
    examination: Examination,
    config: T5Config,
    layout: Layout,
    scales: StackScales | None,
    decoder_scales: StackScales | None = None,
) -> tuple[list[Recipe], Callable[[str], Tensor]]:
    """How each tensor of the model is made from this checkpoint, and what reads its ingredients."""
    if layout == "separate":
        return separate_recipes(config, scales), examination.read
    recipes = fused_recipes(config, scales, decoder_scales)
    has_decoder = config.num_decoder_layers > 0
    same_decoder = not has_decoder or decoder_scales == examination.decoder_scales
    if examination.is_native and scales == examination.scales and same_decoder:
        return native.stored(recipes), examination.checkpoint.read
    return recipes, examination.read


def _used_by(recipes: list[Recipe], keymap: KeyMap) -> tuple[str, ...]:
    names = [name for recipe in recipes for name in recipe.originals]
    return tuple(dict.fromkeys([*names, *(keymap.scales[name] for name in names if name in keymap.scales)]))


def _ignored(examination: Examination, used: tuple[str, ...]) -> dict[str, str]:
    keymap = examination.keymap
    unused = {
        full: "belongs to the decoder"
        for name, full in [*keymap.names.items(), *keymap.scales.items()]
        if name.startswith(("decoder.", "lm_head.")) and name not in used
    }
    return keymap.ignored | unused
