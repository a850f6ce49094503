"""The command ``nai-t5``. Every command takes ``--json`` for one machine-readable object on stdout.

Commands import torch when they run, and these modules do not, so that ``nai-t5 --help`` answers at once.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer

from nai_t5_core.cli.cache import app as cache
from nai_t5_core.cli.checkpoints import calibrate, convert, inspect, stress
from nai_t5_core.cli.doctor import doctor
from nai_t5_core.cli.export import export
from nai_t5_core.cli.generate import generate
from nai_t5_core.cli.kernels import app as kernels
from nai_t5_core.cli.kinds import bench_kinds
from nai_t5_core.cli.measure import bench, bench_generate, estimate, parity
from nai_t5_core.cli.precompute import app as precompute
from nai_t5_core.cli.prompts import count, encode, warm_up
from nai_t5_core.cli.terminal import err, never_fail_on_an_encoding, say
from nai_t5_core.cli.train import train

app = typer.Typer(
    help="A fast and exact T5 text encoder. Without --model, commands use a tiny embedded model and need no download.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    *(encode, count, warm_up, generate),
    *(inspect, convert, calibrate, stress),
    *(doctor, parity, bench, bench_generate, bench_kinds, estimate, train, export),
):
    app.command()(command)
app.add_typer(kernels, name="kernels", no_args_is_help=True)
app.add_typer(cache, name="cache", no_args_is_help=True)
app.add_typer(precompute, name="precompute", no_args_is_help=True)


def main() -> None:
    """The entry point. ValueError and OSError become one line on stderr and exit status 2; a warning is one line."""
    never_fail_on_an_encoding()
    warnings.showwarning = _say_warning
    try:
        app(prog_name="nai-t5")
    except (ValueError, OSError) as error:
        say(_in_one_line(error), err, "error:", "red")
        sys.exit(2)


def _say_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(str(message), err, "warning:", "yellow")


def _in_one_line(error: Exception) -> str:
    """The message in one line; the items of a list are joined by semicolons."""
    listed = str(error).replace(":\n  - ", ": ").replace("\n  - ", "; ")
    return " ".join(listed.split())
