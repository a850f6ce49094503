"""Input and output of the commands: prompts from files, results on stdout, everything else on stderr.

Texts are printed as they are: rich's markup and emoji codes are off, and styled text is a rich Text.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Group
    from rich.progress import ProgressColumn

_WIDEST = 1000

out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)


def never_fail_on_an_encoding() -> None:
    """Makes stdout and stderr escape characters that their encoding lacks, such as an arrow as ``\\u2192``."""
    for stream in (sys.stdout, sys.stderr):
        # A replacement of a stream may lack this method, and without a console the streams are None.
        change: Callable[..., None] | None = getattr(stream, "reconfigure", None)
        if change is not None:
            change(errors="backslashreplace")


def size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def counted(count: int, noun: str) -> str:
    """``1 shard`` and ``2 shards``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def short(text: object, width: int = 60) -> str:
    flat = " ".join(str(text).split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."


def say(text: str, console: Console = out, title: str = "", style: str = "") -> None:
    """Prints a styled title and a text in one line, however long: wrapping would break paths and messages."""
    console.print(Text.assemble((title, style), " " if title and text else "", text), highlight=False, soft_wrap=True)


def print_whole(parts: Group) -> None:
    """Prints tables of figures as wide as they are: a narrower terminal wraps their lines, and no figure is cut off."""
    from rich.measure import Measurement
    from rich.table import Table

    for part in parts.renderables:
        width = out.width
        if isinstance(part, Table):
            width = max(width, Measurement.get(out, out.options.update(max_width=_WIDEST), part).maximum)
        out.print(part, width=width, crop=False)


def print_json(report: dict[str, Any]) -> None:
    # ASCII, which every terminal's encoding has; and not by rich, which would wrap long lines.
    print(json.dumps(report))


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr, so that stdout holds results only."""
    with status(what):
        yield


@contextmanager
def status(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner for work of several parts; gives the function to call with the name of each part."""
    with err.status(Text(what)) as shown:
        yield lambda part: shown.update(Text(part))


@contextmanager
def not_collecting() -> Iterator[None]:
    """For the import of torch, a fifth of whose time goes to a search for garbage among all that it makes.

    They stay to the end, and no later collection looks at them. Where torch is imported already, nothing is changed.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for work measured in bytes; gives the function to call with (done, total)."""
    from rich.progress import DownloadColumn

    with _bar(what, DownloadColumn()) as advance:
        yield advance


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for work that is counted; gives the function to call with (done, total)."""
    from rich.progress import MofNCompleteColumn

    with _bar(what, MofNCompleteColumn()) as advance:
        yield advance


@contextmanager
def _bar(what: str, amount: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeRemainingColumn())
    # Disabled where stderr is no terminal: even a bar that is never drawn leaves an empty line there.
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        ValueError: it cannot be read as UTF-8 text.
    """
    try:
        # Not splitlines(), which also splits at characters that are no line ends in a text file.
        lines = file.read_text(encoding="utf-8-sig").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text: {error}; give a text file") from error
    return lines.split("\n") if lines else []


def all_prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    """The prompts of the command line and those of a file.

    Raises:
        ValueError: there are none, or the file cannot be read.
    """
    texts = [*(prompts or []), *(read_prompts(file) if file is not None else [])]
    if not texts:
        raise ValueError("no prompts; give one or more in quotes, or --file with one per line")
    return texts
