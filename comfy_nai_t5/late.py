"""CLIPs whose files are read at the first prompt whose embedding is not kept.

ComfyUI builds the CLIP on tensors without numbers, so that LoRAs find their keys and everything else its place; when
the weights are needed, a second CLIP is loaded as ever, and its modules' contents go over into the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from comfy_nai_t5.checkpoint import checkpoint_without_weights, holds_t5, whole
from comfy_nai_t5.choices import Settings
from comfy_nai_t5.clip import T5Clip, with_our_t5
from comfy_nai_t5.clip_cache import ClipCache, store_for, transplant
from comfy_nai_t5.families import AUTO, family_for
from comfy_nai_t5.loaders import device_options, load_t5, load_with_clip, stock_clip, stock_joint_clip
from nai_t5_core.prompts.cache.contents import file_contents, weights_contents
from nai_t5_core.weights.examine import Examination, examine

_NOWHERE = torch.device("meta")


def late_t5(path: str | Path | None, family: str = AUTO, settings: Settings | None = None) -> T5Clip:
    """As :func:`comfy_nai_t5.loaders.load_t5`, with the cache of the settings, and late.

    Raises:
        ValueError: as :func:`comfy_nai_t5.loaders.load_t5`.
    """
    settings = settings or Settings(cache="on")
    checkpoint = checkpoint_without_weights(path, settings.unpacks)
    chosen = family_for(checkpoint.config, family)
    clip = stock_clip(checkpoint, chosen, settings.device, disable_dynamic=True, initial_device=_NOWHERE)
    plain = replace(settings, cache="off")

    def load() -> Any:
        return load_t5(path, family, plain, disable_dynamic=True)

    known = [_weights_of(checkpoint.examination)]
    return _late(clip, [path], [chosen.name, settings.weights], settings, load, known)


def late_with_clip(
    paths: Sequence[str | Path],
    family: str,
    settings: Settings | None = None,
    model_options: Mapping[str, Any] | None = None,
) -> T5Clip:
    """As :func:`comfy_nai_t5.loaders.load_with_clip`, with the cache of the settings, and late: all encoders.

    Raises:
        ValueError: as :func:`comfy_nai_t5.loaders.load_with_clip`.
    """
    settings = settings or Settings(cache="on")
    options = {**device_options(settings.device), **(model_options or {})}
    clip = stock_joint_clip(paths, family, options, disable_dynamic=True, without_weights=True, unpack=settings.unpacks)
    plain = replace(settings, cache="off")

    def load() -> Any:
        return load_with_clip(paths, family, plain, model_options, disable_dynamic=True)

    return _late(clip, paths, [family, settings.weights], settings, load)


def _late(
    clip: Any,
    paths: Sequence[str | Path | None],
    facts: list[str],
    settings: Settings,
    load: Callable[[], Any],
    known: list[str] | None = None,
) -> T5Clip:
    base = _base(known or [_contents(path) for path in paths], facts)

    def fill(clip: Any) -> None:
        real = load()
        if _base([_contents(path) for path in paths], facts) != base:
            raise ValueError("a file of the text encoders was changed after they were chosen; run the loader again")
        # What ComfyUI notes on modules while it has them on a device is none of the weights.
        real.patcher.detach()
        transplant(real.patcher.model, clip.patcher.model)
        clip.patcher.size = 0  # counted anew when it is next asked for

    clip.cache = ClipCache(store_for(settings.cache), base, fill)
    return with_our_t5(clip, settings)


def _base(contents: list[str], facts: list[str]) -> str:
    """The hash of what all files hold, in any order, and of what else is the same for all prompts."""
    return hashlib.sha256(json.dumps([sorted(contents), facts]).encode()).hexdigest()


def _contents(path: str | Path | None) -> str:
    if path is None or holds_t5(path):
        return _weights_of(examine(whole(path)))
    return file_contents(Path(path))


def _weights_of(examination: Examination) -> str:
    config = examination.config.encoder_only().model_dump_json()
    return f"{weights_contents(examination)} {config}"
