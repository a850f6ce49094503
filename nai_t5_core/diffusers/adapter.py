"""Our encoder in the place of a diffusers pipeline's T5, and back.

    pipe = replace_text_encoder(pipe, dtype=torch.float16)

The pipeline's class tells which rows of the encoder's output are ever read, and so whether pad rows may be left out.
Needs the extra ``diffusers``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

try:
    from diffusers import DiffusionPipeline
    from diffusers.hooks import HookRegistry, apply_group_offloading
    from diffusers.hooks.group_offloading import GroupOffloadingHook
except ImportError as error:
    raise ImportError("this needs diffusers; install it with: pip install 'comfy-nai-t5[diffusers]'") from error

from nai_t5_core.backends.choices import ProductsChoice, Quantisation
from nai_t5_core.backends.held import is_in_8_bits
from nai_t5_core.diffusers.cached_drop_in import CachedT5EncoderModel, settings_of_model
from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel
from nai_t5_core.diffusers.drop_in_products import refuse_impossible
from nai_t5_core.diffusers.drop_in_weights import check_model, has_values, refuse_giving_back, refuse_quantised
from nai_t5_core.facts.families import Family
from nai_t5_core.facts.families import family as family_named
from nai_t5_core.facts.padding import PaddingPolicy
from nai_t5_core.model.encoder import Layout
from nai_t5_core.model.packing import check_policy
from nai_t5_core.prompts.cache.store import Store, open_store
from nai_t5_core.prompts.choices import Choices
from nai_t5_core.weights.chosen import ScalesChoice

_MODEL_TYPES = ("t5", "mt5", "umt5")

# What stood in the place of each of our encoders: a transformers model, without its weights unless ours is in 8 bits.
_REPLACED: WeakKeyDictionary[NAIT5EncoderModel, nn.Module] = WeakKeyDictionary()


@dataclass(frozen=True)
class PaddingChoice:
    """What a pipeline allows for pad rows, and why.

    Raises:
        ValueError: an unknown policy, or a negative number of pad positions.
    """

    padding: PaddingPolicy
    extra_pad: int
    reason: str

    def __post_init__(self) -> None:
        check_policy(self.padding, self.extra_pad)


def family_of(pipe: Any) -> Family | None:
    """The family of a pipeline, by the name of its class or of a class that it derives from; None if unknown."""
    for base in type(pipe).__mro__:
        try:
            return family_named(base.__name__)
        except ValueError:
            continue
    return None


def padding_for(pipe: Any) -> PaddingChoice:
    """The padding policy that changes nothing in what a pipeline makes, at the least work.

    ``"skip"`` where the table of families says that no pad row is ever read. Everywhere else ``"exact"``: without a
    mask it computes everything, with one it computes pad rows as transformers does.
    """
    row = family_of(pipe)
    if row is None:
        return PaddingChoice("exact", 0, f"{type(pipe).__name__} is not in the table of families")
    if row.padding in ("skip", "trim"):
        return PaddingChoice("skip", row.extra_pad, row.reason)
    return PaddingChoice("exact", 0, row.reason)


def replace_text_encoder(
    pipe: DiffusionPipeline,
    dtype: torch.dtype | str | None = None,
    *,
    padding: PaddingPolicy | None = None,
    extra_pad: int | None = None,
    layout: Layout = "fused",
    scales: ScalesChoice = "auto",
    quantize: Quantisation | None = None,
    cache: bool | str | Path | Store = False,
    offload: bool = False,
    products: ProductsChoice = "auto",
) -> DiffusionPipeline:
    """Puts our encoder in the place of every T5, mT5 and UMT5 of a pipeline, and returns the pipeline.

    The weights are taken over one by one, so that memory never holds both models; the old encoder is left without
    values until :func:`restore_text_encoder`. Other pipelines that share it must be made (with ``from_pipe``) after
    this, not before. Device and offloading stay as they are. Where ours is there already, its padding policy is set.

    Args:
        dtype: by default that of each encoder; float16 gets scales that keep it in range.
        padding, extra_pad: in place of what :func:`padding_for` finds.
        layout, scales: see :meth:`nai_t5_core.diffusers.drop_in.NAIT5EncoderModel.from_hf`. With ``layout="separate"``
            restoring gives back the very tensors; from ``"fused"`` they are exact to rounding.
        quantize: ``"int8"`` computes the projections in 8 bits on the CPU, see
            :func:`nai_t5_core.backends.choose.quantize_int8`. The old encoder then keeps its weights, so that restoring
            gives back every bit, and memory holds both: for less,
            ``NAIT5EncoderModel.from_pretrained(…, quantize="int8")`` goes into the pipeline as it is made. Ours is then
            no more moved, cast or saved.
        cache: keeps embeddings: True for the default folder, a folder, or a :class:`nai_t5_core.Store`. The weights are
            hashed for it each time. To start a pipeline without its T5, see
            :func:`nai_t5_core.diffusers.cached_drop_in.lazy_text_encoder`.
        offload: the weights stay in the host's memory, and each layer comes to the device for its work, wherever the
            pipeline is moved; see
            :meth:`nai_t5_core.diffusers.drop_in.NAIT5EncoderModel.enable_layerwise_offload`.
        products: what computes on a CPU, see :meth:`nai_t5_core.diffusers.drop_in.NAIT5EncoderModel.from_hf`.

    Raises:
        ValueError: the pipeline has no T5, is spread over devices, or offloads groups to disk; an argument has a value
            that there is not; or 8 bits or products are asked for and not possible here, or the pipeline's offloading
            computes on another device than the CPU, or an encoder is ours already.
        CheckpointError: an encoder has adapters or quantised weights, or exceeds float16.

    What is refused is refused before anything is changed.
    """
    found = _encoders(pipe, lambda module: getattr(getattr(module, "config", None), "model_type", "") in _MODEL_TYPES)
    if not found:
        raise ValueError(f"{type(pipe).__name__} has no T5 text encoder loaded; it has {_listed(pipe)}")
    choice = _choice(pipe, padding, extra_pad)
    store = None if cache is False else open_store(cache)
    theirs = {name: module for name, module in found.items() if not isinstance(module, NAIT5EncoderModel)}
    for module in theirs.values():
        refuse_quantised(module)
    how = Choices(layout=layout, scales=scales, quantize=quantize, products=products, offload=offload)
    refuse_impossible(how, torch.device("cpu"), torch.float32)
    if quantize is not None:
        _refuse_ours_before_8_bits(found)
        _refuse_offloading_from_the_cpu(pipe, found, "quantize: 8 bits are")
    if products != "auto":
        _refuse_ours_by_others(found, products)
        _refuse_offloading_from_the_cpu(pipe, found, f"products={products!r} is for what is")
    if store is not None:
        _refuse_ours_without_cache(found)

    def check(old: nn.Module) -> None:
        check_model(old, dtype, how)

    def convert(old: nn.Module) -> NAIT5EncoderModel:
        settings = None if store is None else settings_of_model(old, how)
        kind = NAIT5EncoderModel if store is None else CachedT5EncoderModel
        ours = kind.from_hf(old, dtype, layout, scales, quantize is None, quantize, offload, products)
        ours.train(old.training)
        if isinstance(ours, CachedT5EncoderModel) and settings is not None and store is not None:
            ours.keep_in(store, settings)
        _REPLACED[ours] = old
        return ours

    _exchange(pipe, theirs, check, convert)
    for name in found:
        ours: Any = getattr(pipe, name)
        ours.padding, ours.extra_pad = choice.padding, choice.extra_pad
        if store is not None:
            ours.use_store(store)
        if offload:
            ours.enable_layerwise_offload()
    return pipe


def _refuse_ours_without_cache(found: dict[str, nn.Module]) -> None:
    ours = {name: module for name, module in found.items() if isinstance(module, NAIT5EncoderModel)}
    without = [name for name, one in ours.items() if not (isinstance(one, CachedT5EncoderModel) and one.can_keep)]
    if without:
        raise ValueError(
            f"cache: {', '.join(without)} is ours already, and has none; call restore_text_encoder(pipe) first, or "
            "give lazy_text_encoder(…) to the pipeline"
        )


def _refuse_ours_before_8_bits(found: dict[str, nn.Module]) -> None:
    exact = [name for name, ours in found.items() if isinstance(ours, NAIT5EncoderModel) and not is_in_8_bits(ours)]
    if exact:
        raise ValueError(
            f"quantize: {', '.join(exact)} is ours already, and not in 8 bits; call restore_text_encoder(pipe) first, "
            "or load it with NAIT5EncoderModel.from_pretrained(…, quantize='int8') and give that to the pipeline"
        )


def _refuse_ours_by_others(found: dict[str, nn.Module], products: ProductsChoice) -> None:
    others = [name for name, ours in found.items() if isinstance(ours, NAIT5EncoderModel) and ours.products != products]
    if others:
        raise ValueError(
            f"products={products!r}: {', '.join(others)} is ours already, and computed by others; call "
            "restore_text_encoder(pipe) first, or load it with these products and give that to the pipeline"
        )


def _choice(pipe: Any, padding: PaddingPolicy | None, extra_pad: int | None) -> PaddingChoice:
    """What the pipeline allows, or what is given in its place."""
    found = padding_for(pipe)
    return PaddingChoice(
        found.padding if padding is None else padding, found.extra_pad if extra_pad is None else extra_pad, found.reason
    )


def restore_text_encoder(pipe: DiffusionPipeline, release: bool = False) -> DiffusionPipeline:
    """Undoes :func:`replace_text_encoder`: the old objects come back with their weights, in the dtype they had.

    Args:
        release: our encoder loses its weights meanwhile, so that memory never holds both; for a pipeline that shares it
            with no other.

    Raises:
        ValueError: there is nothing to restore, an encoder was loaded as ours and has replaced nothing, has live LoRAs,
            or another number of tokens by now.

    What is refused is refused before anything is changed.
    """
    ours = _encoders(pipe, lambda module: isinstance(module, NAIT5EncoderModel))
    if not ours:
        raise ValueError(f"{type(pipe).__name__} has no encoder of ours; it has {_listed(pipe)}")
    loaded = [name for name, module in ours.items() if module not in _REPLACED]
    if loaded:
        raise ValueError(
            f"{', '.join(loaded)} did not replace a model of transformers in this process; save it with "
            "save_pretrained(…, save_format='transformers') and load that with transformers"
        )

    def check(model: Any) -> None:
        refuse_giving_back(model.stack, _REPLACED[model])

    def convert(model: Any) -> nn.Module:
        old = _REPLACED[model]
        if not has_values(old):
            model.give_back(old, release)
        del _REPLACED[model]
        return old.train(model.training)

    _exchange(pipe, ours, check, convert)
    return pipe


def _encoders(pipe: Any, is_wanted: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """The components of a kind; of compiled ones, what was compiled."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    originals: dict[str, Any] = {name: getattr(module, "_orig_mod", module) for name, module in modules.items()}
    return {name: module for name, module in originals.items() if is_wanted(module)}


def _listed(pipe: Any) -> str:
    return ", ".join(name for name, part in pipe.components.items() if isinstance(part, nn.Module)) or "no models"


def _exchange(
    pipe: Any,
    old: dict[str, nn.Module],
    check: Callable[[nn.Module], None],
    convert: Callable[[nn.Module], nn.Module],
) -> None:
    """Sets components anew while no offloading holds their weights, and sets that up again.

    All of them are checked before the first is converted; one that stands in two places is converted once.
    """
    if not old:
        return
    _refuse_offloading(pipe, old)
    resume = _pause_offloading(pipe)
    resume_groups = {name: _pause_group_offloading(module) for name, module in old.items()}
    try:
        for module in old.values():
            check(module)
        converted: dict[nn.Module, nn.Module] = {}
        for name, module in old.items():
            if module not in converted:
                converted[module] = convert(module)
            setattr(pipe, name, converted[module])
    finally:
        for name, resume_group in resume_groups.items():
            resume_group(getattr(pipe, name))
        resume()


# ---------------------------------------------------------------------------------------------------------------------
# Offloading
# ---------------------------------------------------------------------------------------------------------------------


def _refuse_offloading(pipe: Any, modules: dict[str, nn.Module]) -> None:
    """Refuses what cannot be paused and set up again."""
    if getattr(pipe, "hf_device_map", None):
        raise ValueError("the pipeline is spread over devices (device_map); call pipe.reset_device_map() first")
    if _is_hooked(pipe) and getattr(pipe, "_offload_device", None) is None:
        raise ValueError("accelerate's hooks are on a component, but not by the pipeline; remove them first")
    if any(hook.config.offload_to_disk_path is not None for part in modules.values() for hook in _group_hooks(part)):
        raise ValueError("the text encoder is offloaded to disk in groups; replace it before enabling that")


def _refuse_offloading_from_the_cpu(pipe: Any, modules: dict[str, nn.Module], asked: str) -> None:
    """What was asked for is computed on the CPU, where weights in 8 bits stay."""
    devices = [hook.config.onload_device for part in modules.values() for hook in _group_hooks(part)]
    if _is_hooked(pipe) and getattr(pipe, "_offload_device", None) is not None:
        devices.append(pipe._offload_device)
    elsewhere = [device for device in devices if torch.device(device).type != "cpu"]
    if elsewhere:
        raise ValueError(
            f"{asked} computed on the CPU, and the pipeline's offloading has its parts computed on "
            f"{elsewhere[0]}; encode on a pipeline of the text encoder alone, which stays on the CPU"
        )


def _is_hooked(pipe: Any) -> bool:
    return any(hasattr(part, "_hf_hook") for part in pipe.components.values() if isinstance(part, nn.Module))


def _pause_offloading(pipe: Any) -> Callable[[], None]:
    """Removes accelerate's hooks from all of a pipeline, which brings weights back; returns what sets them up again."""
    if not _is_hooked(pipe):
        return lambda: None
    device = pipe._offload_device
    enable = pipe.enable_model_cpu_offload if pipe._all_hooks else pipe.enable_sequential_cpu_offload
    pipe.remove_all_hooks()
    return lambda: enable(device=device)


def _group_hooks(module: nn.Module) -> list[Any]:
    registries: list[Any] = [part._diffusers_hook for part in module.modules() if hasattr(part, "_diffusers_hook")]
    return [hook for found in registries for hook in found.hooks.values() if isinstance(hook, GroupOffloadingHook)]


def _pause_group_offloading(module: nn.Module) -> Callable[[nn.Module], None]:
    """The same for diffusers' group offloading, which is set up for each model."""
    hooks = _group_hooks(module)
    if not hooks:
        return lambda module: None
    config = hooks[0].config
    for hook in hooks:
        hook.group.onload_()
    registry = HookRegistry.check_if_exists_or_initialize(module)
    for name in ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"):
        registry.remove_hook(name, recurse=True)
    settings: dict[str, Any] = {
        "onload_device": config.onload_device,
        "offload_device": config.offload_device,
        "offload_type": config.offload_type,
        "num_blocks_per_group": config.num_blocks_per_group,
        "non_blocking": config.non_blocking,
        "use_stream": config.stream is not None,
        "record_stream": config.record_stream,
        "low_cpu_mem_usage": config.low_cpu_mem_usage,
    }
    return lambda module: apply_group_offloading(module, **settings)
