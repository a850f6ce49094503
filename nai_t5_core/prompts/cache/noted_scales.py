"""Scales that a guard has tightened, noted for the next process: it begins with them, and finds what was kept since."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from nai_t5_core.facts.paths import cache_folder
from nai_t5_core.facts.scales import StackScales
from nai_t5_core.prompts.cache.key import Settings
from nai_t5_core.weights.whole_files import write_whole


def noted_scales(settings: Settings) -> StackScales | None:
    """What the scales of an encoder with these settings became; None where nothing is known of it."""
    with suppress(OSError, ValueError):
        scales = StackScales.from_json(_place(settings).read_text(encoding="utf-8"))
        if len(scales.layers) == settings.config.num_layers:
            return scales
    return None


def note_scales(settings: Settings, scales: StackScales) -> None:
    """Notes what they became. Where that cannot be written, the next process tightens them again."""
    with suppress(OSError):
        place = _place(settings)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, scales.to_json())


def _place(settings: Settings) -> Path:
    return cache_folder() / "scales" / f"{settings.key([0]).digest}.json"
