"""The log of a run: JSON lines, one every ``log_every`` steps, and a plot of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nai_t5_core.facts.nested_text import parse_object
from nai_t5_core.weights.whole_files import replacing

NAME = "losses.jsonl"


@dataclass(frozen=True)
class StepReport:
    """One step: its number from 1 on, mean loss per label, learning rate, gradient norm before clipping, labels."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    targets: int


class LossLog:
    """Appends reports to a file. A run that resumes at ``step`` first drops the reports of later steps."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [report for report in read_losses(path) if report.step <= step] if path.is_file() else []
        with replacing(path) as partial:
            partial.write_text("".join(map(_line, kept)), encoding="utf-8")

    def append(self, report: StepReport) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(report))


def _line(report: StepReport) -> str:
    return json.dumps(asdict(report)) + "\n"


def read_losses(path: Path) -> list[StepReport]:
    """The reports in a log. A last line that an interruption cut short is left out.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        complete = path.read_text(encoding="utf-8").split("\n")[:-1]
        return [StepReport(**parse_object(line)) for line in complete]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no log of a training run ({error}); move it away") from error


def require_matplotlib() -> None:
    """Raises a ValueError that names the extra where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError('the plot needs matplotlib: pip install "comfy-nai-t5[plot]"') from error


def plot_losses(reports: list[StepReport], path: Path, title: str = "Training") -> None:
    """Draws the loss over the steps, with its running mean, above the learning rate, into a PNG.

    Raises:
        ValueError: matplotlib is not installed, or there is nothing to draw.
    """
    if not reports:
        raise ValueError("there is nothing to plot: no step was logged")
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    steps, values = [report.step for report in reports], [report.loss for report in reports]
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1, label="single steps")
    axes.plot(steps, running_mean(values), color="tab:blue", linewidth=2, label="running mean")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set(ylabel="cross-entropy per token, nats", title=title, xlim=(0, steps[-1]))
    axes.legend(loc="upper right")
    below.plot(steps, [report.learning_rate for report in reports], color="tab:orange")
    below.set(xlabel="step", ylabel="learning rate")
    below.set_ylim(bottom=0)
    for panel in (axes, below):
        panel.grid(alpha=0.3)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def running_mean(values: Sequence[float], share: float = 0.02) -> list[float]:
    """The mean of each value and its neighbours: on each side ``share`` of all values, fewer at the ends."""
    reach = round(len(values) * share)
    windows = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]
