"""How the pipelines of some families clean a prompt before they tokenize it."""

import html
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from typing import Literal

TextCleaning = Literal["none", "lower-strip", "wan", "quoted", "double-quoted"]


def clean_text(text: str, kind: TextCleaning) -> str:
    """Clean a prompt as a family's pipeline does.

    Args:
        text: the prompt.
        kind: `none` leaves it alone; `lower-strip` lower-cases and strips; `wan` repairs broken Unicode (if ftfy is
            installed), resolves HTML entities twice and collapses whitespace; `quoted` keeps the quoted parts only,
            each as `Text "...". `; `double-quoted` does the same for double quotes only, and drops repetitions.

    Returns:
        The cleaned text; empty where `quoted` or `double-quoted` finds nothing in quotes.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in _CLEANERS:
        raise ValueError(f"Unknown text cleaning {kind!r}; known: {', '.join(_CLEANERS)}.")
    return _CLEANERS[kind](text)


def repairs_unicode(kind: TextCleaning) -> bool:
    """Whether a way of cleaning does more where ftfy is installed."""
    return kind == "wan"


def _lower_strip(text: str) -> str:
    return text.lower().strip()


def _wan(text: str) -> str:
    if not _needs_no_repair(text):
        with suppress(ImportError):  # the pipeline goes without ftfy as well
            text = import_module("ftfy").fix_text(text)
        text = html.unescape(html.unescape(text))
    return " ".join(text.split())


def _needs_no_repair(text: str) -> bool:
    """Whether there is surely nothing for ftfy and for HTML's entities; of English captions most are such."""
    return text.isascii() and text.isprintable() and "&" not in text


def _quoted(text: str) -> str:
    # one kind of quote after the other, not in the order of the text
    return _as_glyphs([part for pair in ("''", '""', "‘’", "“”") for part in _between(text, pair)])


def _double_quoted(text: str) -> str:
    return _as_glyphs(list(dict.fromkeys(_between(text, '""', "“”"))))


def _between(text: str, *pairs: str) -> Iterator[str]:
    """What stands between the two marks of a pair, on one line; the reference has a regular expression for it.

    That one looks for the end of the line again at every mark without a partner; here the time grows with the text.
    """
    for line in text.split("\n"):
        closing = {pair[0]: pair[1] for pair in pairs}
        position = 0
        while closing:
            begin = None
            for mark in re.finditer(f"[{''.join(pairs)}]", line[position:]):
                place = position + mark.start()
                if begin is None:
                    begin = place if mark[0] in closing else None
                elif mark[0] == closing[line[begin]]:
                    yield line[begin + 1 : place]
                    begin = None
            if begin is None:
                break
            # Nothing closes it, nor any further one of its kind.
            del closing[line[begin]]
            position = begin + 1


def _as_glyphs(parts: list[str]) -> str:
    return "".join(f'Text "{part}". ' for part in parts)


_CLEANERS: dict[str, Callable[[str], str]] = {
    "none": str,
    "lower-strip": _lower_strip,
    "wan": _wan,
    "quoted": _quoted,
    "double-quoted": _double_quoted,
}
