"""JSON and TOML out of files that may hold anything.

What is nested deeper than any file of a model is refused: parsers, and whatever shows or writes their results, call
themselves once for each level, and Python ends that with an error of its own.
"""

from __future__ import annotations

import json
import reprlib
import sys
from typing import Any

# Levels of lists and objects within each other. A tokenizer.json has about ten.
MOST_LEVELS = 100
_TOO_DEEP = f"lists and objects are nested in more than {MOST_LEVELS} levels"


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 80


shown = _Short().repr
"""Any value for a message: as repr() has it, with only the beginning of what is long or deep."""


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text stands for.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _refuse_depth(value)
    return value


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The same, of a text that has to be an object.

    Raises:
        ValueError: it is no JSON, another kind of value, or nested too deeply.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a JSON {type(value).__name__}, and an object is needed")
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """The table that a TOML text stands for.

    Raises:
        ValueError: it is no TOML, or nested too deeply.
    """
    # Imported where it is needed: hardly any text is one.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        value: dict[str, Any] = tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _refuse_depth(value)
    return value


def _refuse_depth(value: object) -> None:
    level: list[Any] = [[value]]
    for _ in range(MOST_LEVELS + 1):
        within = (container.values() if isinstance(container, dict) else container for container in level)
        level = [entry for entries in within for entry in entries if isinstance(entry, (dict, list))]
        if not level:
            return
    raise ValueError(_TOO_DEEP)
