"""Numbers as callers give them: of tokens and rows, and those that something is multiplied by."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

from nai_t5_core.facts.nested_text import shown

_MOST_FACTOR = 1e9


def whole_number(name: str, value: Any, least: int = 0, most: int | None = None) -> int:
    """The value of an argument that counts something; numpy's and torch's whole numbers are such as well.

    Raises:
        ValueError: it is another kind of value, such as 1.5, "5", True or NaN, or too small or too large.
    """
    number = _as_int(value)
    if number is None:
        allowed = f"a whole number, {least:,} or more"
    elif number < least:
        allowed = f"{least:,} or more"
    elif most is not None and number > most:
        allowed = f"at most {most:,}"
    else:
        return number
    raise ValueError(f"{name}={shown(value)}; it must be {allowed}")


def real_number(name: str, value: Any) -> float:
    """The value of an argument that multiplies something.

    Raises:
        ValueError: it is no number, not finite, or beyond anything that a model can be multiplied by.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not -_MOST_FACTOR <= value <= _MOST_FACTOR:
        raise ValueError(f"{name}={shown(value)}; it must be a finite number, at most {_MOST_FACTOR:g}")
    return float(value)


def _as_int(value: Any) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
