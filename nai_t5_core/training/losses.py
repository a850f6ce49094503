"""The log of a run as JSON lines, one for every so many steps, and as a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nai_t5_core.formats import replacing

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
    """Appends to a file. A run that goes on at a step first drops what lies behind that step."""

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
    complete = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [StepReport(**json.loads(line)) for line in complete]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no log of a training run ({error}); move it away") from error


def require_matplotlib() -> None:
    """Raises a ValueError that names the extra where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError('the plot needs matplotlib: pip install "comfy-nai-t5[plot]"') from error


def plot_losses(reports: list[StepReport], path: Path) -> None:
    """Draws the loss over the steps into a PNG.

    Raises:
        ValueError: matplotlib is not installed, or there is nothing to draw.
    """
    if not reports:
        raise ValueError("there is nothing to plot: no step was logged")
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([report.step for report in reports], [report.loss for report in reports])
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy per token, nats")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
