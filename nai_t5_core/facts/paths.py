"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path


def user_path(path: str | Path) -> Path:
    """A path with the folder that ``~`` stands for; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
