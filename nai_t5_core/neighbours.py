"""Where the T5 is when it is not in the place that was given: in a subfolder, or in the folder beside it."""

from __future__ import annotations

from pathlib import Path

from nai_t5_core.formats import CheckpointError, open_checkpoint
from nai_t5_core.keymaps import holds_t5


def advice(place: Path) -> str:
    """What to give in place of a path without a T5, as the end of a message; "" where no T5 is near.

    Looks into the subfolders of a folder and, in a pipeline, into the folders of its other text encoders; of the weight
    files there, headers are read.
    """
    near = [*_folders(place, "*"), *_folders(place.parent, "text_encoder*")]
    found = [path for path in near if path != place and _has_t5(path)]
    if not found:
        return ""
    return ". There is a T5 in " + " and ".join(f"subfolder={path.name!r} of {path.parent}" for path in found)


def _folders(folder: Path, pattern: str) -> list[Path]:
    try:
        return [path for path in sorted(folder.glob(pattern)) if path.is_dir()]
    except OSError:  # it may not be read
        return []


def _has_t5(folder: Path) -> bool:
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return False
    try:
        return holds_t5(open_checkpoint(folder).tensors)
    except CheckpointError:
        return False
