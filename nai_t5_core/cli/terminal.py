"""How commands speak: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

out = Console()
err = Console(stderr=True)


def size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def short(text: object, width: int = 60) -> str:
    flat = " ".join(str(text).split())
    return escape(flat if len(flat) <= width else flat[: width - 1] + "…")


def say(markup: str, console: Console = out) -> None:
    """One line, however long: wrapping would break paths and messages apart."""
    console.print(markup, highlight=False, soft_wrap=True)


def print_json(report: dict[str, Any]) -> None:
    # Plain ASCII, which every terminal's encoding has, and not through rich, which would wrap long lines.
    print(json.dumps(report))


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr, so that stdout holds results only."""
    with err.status(what):
        yield


@contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(escape(what)), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    # Where stderr is no terminal, even a bar that was never drawn leaves an empty line.
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
