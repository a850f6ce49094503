"""Paths as users write them, and where the project keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | Path) -> Path:
    """A path with the folder that ``~`` stands for; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_folder() -> Path:
    """Where the user's programs keep what can be made again (XDG Base Directory Specification); it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comfy-nai-t5"
