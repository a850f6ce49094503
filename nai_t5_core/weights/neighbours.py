"""Where the T5 is when it is not in the place that was given: in a subfolder, or in the folder beside it."""

from __future__ import annotations

from pathlib import Path

from nai_t5_core.weights.formats import CheckpointError, open_checkpoint
from nai_t5_core.weights.keymaps import holds_t5


def advice(place: Path) -> str:
    """What to give in place of a path without a T5, as the end of a message; "" where no T5 is near.

    Looks into the subfolders of a folder and at its files that are called T5, and, in a pipeline, into the folders of
    its other text encoders. Headers are read.
    """
    near = [*_found(place, "*"), *_found(place.parent, "text_encoder*")]
    folders = [path for path in near if path != place and path.is_dir() and _has_weights(path) and _is_t5(path)]
    files = [path for path in _found(place, "*[tT]5*") if path.is_file() and _is_t5(path)]
    advised = [f"subfolder={path.name!r} of {path.parent}" for path in folders] + [f"the file {path}" for path in files]
    return f". There is a T5 in {' and '.join(advised)}" if advised else ""


def _found(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:  # it may not be read
        return []


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.gguf"))


def _is_t5(path: Path) -> bool:
    try:
        return holds_t5(open_checkpoint(path).tensors)
    except CheckpointError:
        return False
