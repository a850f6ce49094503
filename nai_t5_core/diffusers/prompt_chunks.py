"""A long prompt in pieces, each short enough to be encoded by itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable


def split_text(text: str, fits: Callable[[str], bool], most: int, whole: Iterable[str] = ()) -> list[str]:
    """The text in order, in as few pieces as word boundaries allow, without the white space between them.

    Args:
        text: what to split.
        fits: whether a piece is short enough. Of a piece that is, every beginning must be.
        most: the number of pieces that there may be; the last of so many takes all that is left, too long or not.
        whole: words that must not be torn apart, such as ``"red fox"``; upper and lower case are alike.

    Returns:
        One piece at least. A word that does not fit by itself is torn where it must be.
    """
    pieces: list[str] = []
    rest = text
    while len(pieces) < most - 1 and not fits(rest):
        breaks = _breaks(rest, whole)
        length = _last_that_fits(rest, breaks, fits) or _last_that_fits(rest, range(1, len(rest)), fits) or len(rest)
        pieces.append(rest[:length].rstrip())
        rest = rest[length:].lstrip()
    return [*pieces, rest] if rest or not pieces else pieces


def _breaks(text: str, whole: Iterable[str]) -> list[int]:
    """Where white space begins behind a word, except inside what must stay whole."""
    kept = [match.span() for words in whole for match in re.finditer(re.escape(words), text, re.IGNORECASE)]
    places = [match.start() for match in re.finditer(r"(?<=\S)\s+", text)]
    return [place for place in places if not any(start < place < end for start, end in kept)]


def _last_that_fits(text: str, ends: list[int] | range, fits: Callable[[str], bool]) -> int:
    """The greatest of the ends, in rising order, up to which the text fits; 0 if none does."""
    low, high = 0, len(ends)  # ends[:low] fit, ends[high:] do not
    while low < high:
        middle = (low + high) // 2
        if fits(text[: ends[middle]]):
            low = middle + 1
        else:
            high = middle
    return ends[low - 1] if low else 0
