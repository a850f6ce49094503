"""Checkpoints in several files: of how many a file is one, and which index lists it."""

from __future__ import annotations

import re
from pathlib import Path

from nai_t5_core.facts.nested_text import parse_object

# As transformers and llama.cpp name them.
_SHARD = re.compile(r".*-\d{5}-of-(?P<count>\d{5})\.\w+")


def shard_count(path: str | Path) -> int:
    """Of how many files this one is a part, by its name; 1 for a whole checkpoint."""
    shard = _SHARD.fullmatch(Path(path).name)
    return int(shard["count"]) if shard else 1


def index_of(shard: str | Path) -> Path | None:
    """The index beside a shard that lists it, or None."""
    shard = Path(shard)
    return next((index for index in sorted(shard.parent.glob("*.index*.json")) if _lists(index, shard.name)), None)


def _lists(index: Path, name: str) -> bool:
    try:
        weight_map = parse_object(index.read_bytes())["weight_map"]
        return name in weight_map.values()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # damaged, or something else under this name
        return False
