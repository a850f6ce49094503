"""What a caller chooses of a model that is yet to be loaded: device, dtype and scales. Reads no weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from nai_t5_core.backends.auto_dtype import resolve_dtype
from nai_t5_core.facts.scales import StackScales, published_scales
from nai_t5_core.model.attention_choice import ATTENTION_CHOICES
from nai_t5_core.model.encoder import LAYOUTS
from nai_t5_core.model.precision import resolve_device
from nai_t5_core.weights.examine import Examination
from nai_t5_core.weights.scales_file import read_scales

SLOW_FLOAT16 = "float16 is exact enough on a CPU but slow there; dtype='auto' picks what is fastest"


class SlowDtypeWarning(UserWarning):
    """The chosen dtype gives right results on this device, and another would give them sooner."""


ScalesChoice = StackScales | Path | str


def place_for(
    device: str | torch.device,
    dtype: str | torch.dtype,
    layout: str,
    attention: str = "auto",
    has_decoder: bool = False,
) -> tuple[torch.device, torch.dtype]:
    """Where a model goes and what it computes in; refuses what there is not."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; allowed: {', '.join(LAYOUTS)}")
    if attention not in ATTENTION_CHOICES:
        raise ValueError(f"unknown attention {attention!r}; allowed: {', '.join(ATTENTION_CHOICES)}")
    place = resolve_device(device)
    model_dtype = resolve_dtype(dtype, place, has_decoder)
    if model_dtype == torch.float16 and place.type == "cpu":
        warnings.warn(SLOW_FLOAT16, SlowDtypeWarning, stacklevel=4)
    return place, model_dtype


def told_scales(examination: Examination, dtype: torch.dtype, wanted: ScalesChoice = "auto") -> StackScales | None:
    """As :func:`nai_t5_core.weights.load.choose_scales`, without what only the weights tell: none of them is read."""
    scales = given_or_stored(wanted, examination.scales, read_scales)
    return published_scales(examination.config) if scales is None and dtype == torch.float16 else scales


def given_or_stored(
    wanted: ScalesChoice, stored: StackScales | None, read: Callable[[str | Path], StackScales | None]
) -> StackScales | None:
    """The scales that a caller wants: those of a file that ``read`` reads, or else those that are stored."""
    if isinstance(wanted, StackScales):
        return wanted
    return stored if wanted == "auto" else read(wanted)
