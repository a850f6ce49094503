"""From a file to a CLIP with our T5."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import nn

from comfy_nai_t5.checkpoint import (
    ServerCheckpoint,
    checkpoint_without_weights,
    emptied,
    holds_t5,
    read_checkpoint,
    sentencepiece_tensor,
)
from comfy_nai_t5.choices import Settings
from comfy_nai_t5.clip import T5Clip, is_streamed, t5_models, with_our_t5
from comfy_nai_t5.families import AUTO, ServerFamily, check_joint, family_for, server_config
from comfy_nai_t5.fused import takes_kernels
from comfy_nai_t5.live_patches import LivePatcher
from comfy_nai_t5.plain import SPECIAL_TOKENS, TOKENIZER
from comfy_nai_t5.quantised import QuantisedEmbedding, QuantisedLinear
from nai_t5_core.backends.auto_dtype import resolve_dtype
from nai_t5_core.backends.kernels.runners import KERNELS, best
from nai_t5_core.model.precision import is_finite, keeps_finite
from nai_t5_core.weights.formats import is_gguf

_NO_TOKENIZER = (
    "{source} comes without its tokenizer; choose a safetensors file of the same T5 with the tokenizer inside (those "
    "made for ComfyUI have it), a GGUF file with the vocabulary in its metadata, or the model.safetensors of a folder "
    "with spiece.model beside the weights"
)


def device_options(device: str) -> dict[str, Any]:
    """What a loader's device means to ComfyUI: ``"default"`` leaves the choice to it."""
    if device == "default":
        return {"initial_device": comfy.model_management.text_encoder_offload_device()}
    memory = torch.device("cpu")
    return {"load_device": torch.device(device), "offload_device": memory, "initial_device": memory}


def load_t5(
    path: str | Path | None, family: str = AUTO, settings: Settings | None = None, disable_dynamic: bool = False
) -> T5Clip:
    """A CLIP of a T5 alone.

    Args:
        path: a T5 file of any form; None is the embedded tiny model.
        family: a name of :data:`comfy_nai_t5.families.FAMILIES`, or ``"auto"``.
        settings: what is computed in, and how; where, and how weights are kept.
        disable_dynamic: for ComfyUI, when it wants the model without its dynamic memory.

    Raises:
        ValueError: the file is no T5, is damaged, or does not suit the family; impossible settings.
    """
    settings = settings or Settings()
    checkpoint = read_checkpoint(path, settings.unpacks)
    clip = stock_clip(checkpoint, family_for(checkpoint.config, family), settings.device, disable_dynamic)
    del checkpoint  # the file's tensors, which must not be in memory beside those that they are cast to
    _store(clip, settings)
    _remember(clip, load_t5, path, family, settings)
    return with_our_t5(clip, settings)


def _remember(clip: Any, loader: Callable[..., Any], *arguments: Any) -> None:
    """Tells newer servers how to load the model once more, which they do for a second device."""
    if hasattr(clip.patcher, "cached_patcher_init"):
        clip.patcher.cached_patcher_init = (_patcher_of, (loader, arguments))


def _patcher_of(loader: Callable[..., Any], arguments: tuple[Any, ...], disable_dynamic: bool = False) -> Any:
    return loader(*arguments, disable_dynamic=disable_dynamic).patcher


def stock_clip(
    checkpoint: ServerCheckpoint,
    family: ServerFamily,
    device: str = "default",
    disable_dynamic: bool = False,
    **more_options: Any,
) -> Any:
    """ComfyUI's own CLIP of a checkpoint, with the tensors as they are in the file.

    Args:
        more_options: in place of options of ComfyUI's that are made of the arguments.
    """
    model, tokenizer = family.classes()
    target = type("Target", (), {"params": {}, "clip": model, "tokenizer": tokenizer})
    data, options = _special_data(checkpoint, family)
    clip = _new_clip(
        target,
        checkpoint.state,
        disable_dynamic or bool(checkpoint.quantised),
        tokenizer_data=data,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(checkpoint.state),
        model_options={
            "dtype": checkpoint.weight_dtype,
            family.size_option: server_config(checkpoint.config),
            **checkpoint.model_options,
            **options,
            **device_options(device),
            **more_options,
        },
    )
    if checkpoint.quantised:
        _keep_quantised(clip, checkpoint)
    if is_streamed(clip):
        _stream_as_in_the_file(clip)
    return clip


def _stream_as_in_the_file(clip: Any) -> None:
    """Has ComfyUI's dynamic memory hold weights in the file's dtypes, where it would cast them to most weights' dtype.

    Of a float8 file that would be float32. Norms are cast when they are loaded, and not in every call.
    """
    for owner in t5_models(clip.cond_stage_model).values():
        for module in owner.transformer.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                streamed: Any = module
                streamed.weight_comfy_model_dtype = module.weight.dtype


def _keep_quantised(clip: Any, checkpoint: ServerCheckpoint) -> None:
    """Gives a CLIP's T5, which has got no weights yet, those of a checkpoint that stay quantised, and all others."""
    for owner in t5_models(clip.cond_stage_model).values():
        for name, weight in checkpoint.quantised.items():
            parent, _, place = name.removesuffix(".weight").rpartition(".")
            module = QuantisedEmbedding(weight) if name == "shared.weight" else QuantisedLinear(weight)
            setattr(owner.transformer.get_submodule(parent), place, module)
        for name, tensor in checkpoint.beside.items():
            parent, _, place = name.rpartition(".")
            parameter = nn.Parameter(tensor, requires_grad=False)
            setattr(owner.transformer.get_submodule(parent), place, parameter)
    if clip.patcher.loaded_size():
        clip.patcher.detach()  # newer servers have loaded what was there until now
    # The patcher that ComfyUI knows by now, so that there are not two of one model.
    clip.patcher.__class__ = LivePatcher
    clip.patcher.size = 0  # counted anew when it is next asked for


def _special_data(checkpoint: ServerCheckpoint, family: ServerFamily) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tokenizer data and model options of the families whose classes want the tokenizer of the file."""
    is_plain = family.name == "t5"
    if not is_plain and not family.brings_no_tokenizer:
        return {}, {}
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        advice = _NO_TOKENIZER.format(source=checkpoint.examination.checkpoint.source)
        raise ValueError(f"{advice}, or choose the model family that the T5 is for" if is_plain else advice)
    if not is_plain:
        return {"spiece_model": sentencepiece_tensor(tokenizer)}, {}
    return {TOKENIZER: tokenizer}, {SPECIAL_TOKENS: {"end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}}


def _new_clip(target: Any, state: dict[str, torch.Tensor], disable_dynamic: bool, **arguments: Any) -> Any:
    """ComfyUI's CLIP with weights; since dynamic memory, the constructor takes them."""
    if "state_dict" in inspect.signature(comfy.sd.CLIP.__init__).parameters:
        return comfy.sd.CLIP(target, state_dict=[state], disable_dynamic=disable_dynamic, **arguments)
    clip = comfy.sd.CLIP(target, **arguments)
    clip.load_sd(state)
    return clip


def load_with_clip(
    paths: Sequence[str | Path],
    family: str,
    settings: Settings | None = None,
    model_options: Mapping[str, Any] | None = None,
    disable_dynamic: bool = False,
) -> T5Clip:
    """A CLIP of several text encoders of which one is a T5; the others, and the choice of classes, are ComfyUI's.

    Args:
        paths: the files, in any order.
        family: one of :data:`comfy_nai_t5.families.JOINT_FAMILIES`.
        settings: those of the T5, and the device of all.
        model_options: further options of ComfyUI's loader.
        disable_dynamic: as for :func:`load_t5`.

    Raises:
        ValueError: no fitting T5 among the files, too many or too few of them, a damaged one, a GGUF file of another
            encoder; impossible settings.
    """
    settings = settings or Settings()
    options = {**device_options(settings.device), **(model_options or {})}
    clip = stock_joint_clip(paths, family, options, disable_dynamic, unpack=settings.unpacks)
    _store(clip, settings)
    _remember(clip, load_with_clip, paths, family, settings, model_options)
    return with_our_t5(clip, settings)


def stock_joint_clip(
    paths: Sequence[str | Path],
    family: str,
    options: dict[str, Any],
    disable_dynamic: bool = False,
    without_weights: bool = False,
    unpack: bool = False,
) -> Any:
    """ComfyUI's own CLIP of several files.

    Args:
        options: ComfyUI's, to which those of the T5 are added.
        without_weights: build it on tensors without numbers, on the meta device.
        unpack: as for :func:`comfy_nai_t5.checkpoint.read_checkpoint`.
    """
    read = partial(checkpoint_without_weights if without_weights else read_checkpoint, unpack=unpack)
    states, checkpoint = _read_all(paths, options, read)
    if without_weights:
        states = [{name: emptied(tensor) for name, tensor in state.items()} for state in states]
        options["initial_device"] = torch.device("meta")
    check_joint(family, len(paths), checkpoint.config if checkpoint else None)
    stays_quantised = checkpoint is not None and bool(checkpoint.quantised)
    load = comfy.sd.load_text_encoder_state_dicts
    knows_dynamic = "disable_dynamic" in inspect.signature(load).parameters
    clip = load(
        states,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=getattr(comfy.sd.CLIPType, family.upper()),
        model_options=options,
        **({"disable_dynamic": disable_dynamic or stays_quantised} if knows_dynamic else {}),
    )
    if checkpoint is not None and stays_quantised:
        _keep_quantised(clip, checkpoint)
    return clip


def _read_all(
    paths: Sequence[str | Path], options: dict[str, Any], read: Callable[[str | Path], ServerCheckpoint]
) -> tuple[list[dict[str, torch.Tensor]], ServerCheckpoint | None]:
    """The tensors of each file, and the T5 among them, whose options are put to the others."""
    states, checkpoint = [], None
    are_t5 = [holds_t5(path) for path in paths]
    for path, is_t5 in zip(paths, are_t5, strict=True):
        if not is_t5 and is_gguf(Path(path)):
            raise ValueError(
                f"{path} is a GGUF file and holds no T5; ComfyUI's own encoders are not read from GGUF: "
                "choose a safetensors file of this one"
            )
    for path, is_t5 in zip(paths, are_t5, strict=True):
        if not is_t5:
            states.append(_other_encoder(path))
            continue
        checkpoint = read(path)
        states.append(checkpoint.state)
        options["t5xxl_model_config"] = server_config(checkpoint.config)
        options |= {f"t5xxl_{name}": value for name, value in checkpoint.model_options.items()}
    return states, checkpoint


def _other_encoder(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of another text encoder, as ComfyUI's own loader reads them."""
    state, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    if hasattr(comfy.utils, "convert_old_quants"):
        state, _ = comfy.utils.convert_old_quants(state, model_prefix="", metadata=metadata)
    return dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# How weights are kept
# ---------------------------------------------------------------------------------------------------------------------


def _store(clip: Any, settings: Settings) -> None:
    """Casts the weights of a CLIP's T5 as asked for. It must not have been loaded onto a device yet."""
    choice = settings.weights
    is_free = choice in ("auto", "unpack")
    if choice == "file" or (is_free and is_streamed(clip)):
        return
    device = clip.patcher.load_device
    wanted = resolve_dtype(settings.dtype, device) if is_free else getattr(torch, choice)
    # The kernels round float16 as they read it, and 8 bits are made of the very numbers: loading need not round.
    by_kernels = settings.layout != "separate" and not settings.compile and takes_kernels(device, wanted, best(KERNELS))
    kept = (torch.float16,) if is_free and (by_kernels or settings.layout == "int8") else ()
    for owner in t5_models(clip.cond_stage_model).values():
        for name, module in owner.transformer.named_modules():
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Embedding) and wanted.itemsize > 1):
                _cast(module, wanted, name, kept)
    clip.patcher.size = 0  # counted anew when it is next asked for
    if hasattr(comfy.model_management, "archive_model_dtypes"):
        comfy.model_management.archive_model_dtypes(clip.cond_stage_model)


def _cast(module: Any, wanted: torch.dtype, name: str, kept: Collection[torch.dtype]) -> None:
    """Casts a weight, unless it is quantised, or smaller than what is wanted, or in a dtype that is kept."""
    old = module.weight
    if old.dtype == wanted or old.dtype in kept or old.dtype.itemsize == 1 or old.dtype.itemsize < wanted.itemsize:
        return
    weight = old.detach().to(wanted)
    # Rows of the embedding that no prompt uses may be anything in the file.
    is_table = isinstance(module, nn.Embedding)
    if not (keeps_finite(old, weight) if is_table else is_finite(weight.float() if wanted.itemsize == 1 else weight)):
        raise ValueError(f"{name}.weight exceeds the range of {wanted}; keep the weights as they are in the file")
    module.weight = nn.Parameter(weight, requires_grad=False)
