"""``train``: the command that trains a model by a config file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nai_t5_core.cli.options import Json
from nai_t5_core.cli.terminal import err, print_json, say

if TYPE_CHECKING:
    from nai_t5_core.training.losses import StepReport


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="What is trained, on what, and how.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the run's folder.")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG file with the losses.")] = None,
    as_json: Json = False,
) -> None:
    """Train a T5 by span corruption, prefixes or pairs; writes our format and the Hugging Face layout."""
    from nai_t5_core.training.config import read_config

    settings = read_config(config)
    from nai_t5_core.training import losses
    from nai_t5_core.training.loop import train as run_training
    from nai_t5_core.training.processes import joined

    if plot is not None:
        # Checked before the run, and not after hours of training.
        losses.require_matplotlib()
    with joined(settings.device) as processes, _training_bar(processes.is_first) as progress:
        trained = run_training(settings, resume, progress)
    if not processes.is_first:
        return
    if plot is not None:
        losses.plot_losses(trained.reports, plot, f"{config.stem}: {trained.reports[-1].step} steps")
    last = trained.reports[-1]
    report = {
        "steps": last.step,
        "loss": last.loss,
        "first_loss": trained.reports[0].loss,
        "log": str(settings.out / losses.NAME),
        "out": str(trained.file),
        "hf": str(trained.hf_folder),
        **({"plot": str(plot)} if plot is not None else {}),
    }
    if as_json:
        print_json(report)
        return
    say(f"{last.step} steps, loss {report['first_loss']:.3f} to {last.loss:.3f}")
    for name in ("out", "hf", "log", "plot"):
        if name in report:
            say(f"wrote {report[name]}")


@contextmanager
def _training_bar(is_shown: bool) -> Iterator[Callable[[StepReport, int], None]]:
    """A bar on stderr with the loss; gives the function to call with every step's report and the number of steps."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not (is_shown and err.is_terminal)) as bar:
        task = bar.add_task("training", total=None)

        def show(report: StepReport, steps: int) -> None:
            bar.update(task, completed=report.step, total=steps, description=f"training, loss {report.loss:.3f}")

        yield show
