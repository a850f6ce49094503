"""The key of what a CLIP makes of its tokens: all that can change it."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import Any

from torch import Tensor

from comfy_nai_t5.quantised import stays_quantised
from nai_t5_core.backends.kernels.build import set_to_use
from nai_t5_core.prompts.cache.contents import tensor_contents
from nai_t5_core.prompts.cache.key import NUMERICS, Key


class NotKnownError(Exception):
    """Something is in force that no key can tell apart; the prompt is encoded."""


def key_of(clip: Any, base: str, t5_models: dict[str, Any], tokens: dict[str, Any], pooled: Any) -> Key:
    """The key of an encode.

    Args:
        base: of the weights, the family and what else does not change in a CLIP and its clones.
        t5_models: the ``SDClipModel`` of each T5.
        tokens: of all text encoders, with their weights; T5TokenizerOptions are in their number.
        pooled: as ComfyUI's encode takes it.

    Raises:
        NotKnownError: hooks on the weights, patched objects, or a kind of patch or token that is not known.
    """
    _refuse_unknown(clip.patcher)
    stacks = {name: _computing(owner) for name, owner in t5_models.items()}
    model = type(clip.cond_stage_model)
    values = {
        "numerics": NUMERICS,
        "server": _server_version(),
        "model": f"{model.__module__}.{model.__qualname__}",
        "base": base,
        "t5": stacks,
        "patches": _patches(clip.patcher),
        "layer": clip.layer_idx,
        "unprojected": pooled == "unprojected",
        "tokens": _plain(tokens),
    }
    return Key(json.dumps(values, separators=(",", ":"), sort_keys=True))


def _computing(owner: Any) -> list[Any]:
    """How a T5 of ours computes now, and what its owner makes of that."""
    stack = owner.transformer.stack
    scales = None if stack.scales.is_one else stack.scales.to_json()
    # A file may have plain layers beside quantised ones.
    products = [stack.takes_kernels, stack.takes_cuda_layers]
    products += [_quantised_by(stack)] if stays_quantised(owner.transformer) else []
    how = [str(stack.dtype), stack.wish, stack.attention, stack.compiled, *products, stack.device.type]
    masks = [owner.zero_out_masked, owner.return_attention_masks, owner.enable_attention_masks]
    return [*how, owner.transformer.padding, scales, *masks, _plain(owner.special_tokens)]


def _quantised_by(stack: Any) -> str:
    """What computes the products of quantised weights that it can read, whether or not it computes whole layers."""
    instructions = set_to_use() if stack.device.type == "cpu" else None
    if instructions is None or stack.dtype not in instructions.stored:
        return "quantised"
    return f"quantised, {instructions.title} kernels"


@cache
def _server_version() -> str:
    """ComfyUI's; weights of words, and the other text encoders, are its own."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return "unknown"
    return str(__version__)


def _refuse_unknown(patcher: Any) -> None:
    """Hooks change weights in the course of an encode, and others may change anything."""
    unknown = ("hook_patches", "forced_hooks", "injections", "weight_wrapper_patches", "additional_models")
    found = [name for name in unknown if getattr(patcher, name, None)]
    # The server itself notes what is cast to.
    found += [name for name in patcher.object_patches if name != "manual_cast_dtype"]
    wrappers = getattr(patcher, "wrappers", {}).values()
    if found or any(function for by_key in wrappers for function in by_key.values()):
        raise NotKnownError(", ".join(found) or "wrappers")


# The digest of each set of patches by the identity that ComfyUI gives it. There are as many as LoRA choices were tried.
_DIGESTS: dict[Any, str] = {}


def _patches(patcher: Any) -> str:
    """The contents of all patches of the weights, in the order in which they are added."""
    if not patcher.patches:
        return ""
    if patcher.patches_uuid not in _DIGESTS:
        patches = {key: [_patch(entry) for entry in entries] for key, entries in patcher.patches.items()}
        content = json.dumps(patches, separators=(",", ":"), sort_keys=True)
        _DIGESTS[patcher.patches_uuid] = hashlib.sha256(content.encode()).hexdigest()
    return _DIGESTS[patcher.patches_uuid]


def _patch(entry: Any) -> list[Any]:
    strength, patch, strength_model, offset, function = entry
    if function is not None:
        raise NotKnownError("a patch with a function")
    return [strength, _plain(patch), strength_model, _plain(offset)]


def _plain(value: Any) -> Any:
    """A value as JSON has it, with the hash of each tensor in its place."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return {"tensor": tensor_contents(value)}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if _is_adapter(value):
        state = (getattr(value, "multiplier", 1.0), value.weights)
        return {type(value).__name__: _plain(state)}
    raise NotKnownError(f"a {type(value).__name__}")


def _is_adapter(value: Any) -> bool:
    from comfy.weight_adapter import WeightAdapterBase

    return isinstance(value, WeightAdapterBase)
