"""Tables of figures, for a terminal and as Markdown, and how measured values are written in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from nai_t5_core.bench.speed.results import Spread

if TYPE_CHECKING:
    from rich.console import Group, RenderableType


class Table(NamedTuple):
    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def for_terminal(headline: str, tables: Iterable[Table], notes: Iterable[str]) -> Group:
    """A line, the tables, and lines below them."""
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    parts: list[RenderableType] = [Text(headline)]
    for title, headings, rows in tables:
        table = RichTable(title=title, title_justify="left", show_lines=True)
        for heading, *cells in zip(headings, *rows, strict=True):
            # In a narrow terminal, columns shrink at most to their longest word.
            words = " ".join((heading, *cells)).split()
            table.add_column(heading, min_width=max(map(len, words)))
        for row in rows:
            table.add_row(*row)
        parts.append(table)
    return Group(*parts, *(Text(line) for line in notes))


def as_markdown(headline: str, tables: Iterable[Table], notes: Iterable[str]) -> str:
    """The headline, the tables and the notes as Markdown."""
    parts = [headline]
    for title, headings, rows in tables:
        lines = [headings, ("---",) * len(headings), *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"**{title}**\n\n{table}")
    return "\n\n".join([*parts, *notes]) + "\n"


def milliseconds(spread: Spread) -> str:
    digits = 0 if spread.high >= 1 else 1
    median, low, high = (f"{seconds * 1e3:.{digits}f}" for seconds in (spread.median, spread.low, spread.high))
    return f"{median} ms ({low}–{high})"


def seconds(spread: Spread) -> str:
    return f"{spread.median:.2f} s ({spread.low:.2f}–{spread.high:.2f})"


def times(spread: Spread) -> str:
    return f"{spread.median:.2f}× ({spread.low:.2f}–{spread.high:.2f})"


def percent(spread: Spread) -> str:
    return f"{spread.median * 100:.0f}% ({spread.low * 100:.0f}–{spread.high * 100:.0f})"
