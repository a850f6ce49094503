"""Kinds of quantised weights as a picture: what they take against what they lose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nai_t5_core.bench.kinds import QUANTILES, KindRow
from nai_t5_core.bench.plot_labels import label
from nai_t5_core.weights.whole_files import replacing

_SHOWN = 0.99


def plot(rows: Sequence[KindRow], size: str, path: Path) -> None:
    """Draws bits per weight against the error, on a logarithmic axis, into a PNG.

    The first row, which is not quantised, is a line: what is near it loses no more than the dtype does.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('the plot needs matplotlib: pip install "comfy-nai-t5[plot]"') from error
    place = QUANTILES.index(_SHOWN)
    figure = Figure(figsize=(8, 6.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    plain, *kinds = rows
    for meaning, marker, errors in (
        ("random weights", "o", [row.errors[place] for row in kinds]),
        ("with large channels, as trained models have", "x", [row.errors_with_outliers[place] for row in kinds]),
    ):
        axes.scatter([row.bits for row in kinds], errors, marker=marker, s=22, linewidths=1.2, label=meaning)
    if plain.errors[place]:
        meaning = f"{plain.kind}, {plain.bits:g} bits"
        axes.axhline(plain.errors[place], color="gray", linewidth=1, linestyle="--", label=meaning)
    axes.set_yscale("log")
    axes.set_xlabel("bits of a weight")
    axes.set_ylabel(f"error, {100 * _SHOWN:g}% are smaller")
    axes.margins(x=0.12, y=0.12)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(fontsize="small", ncols=3, loc="outside lower center")
    figure.suptitle(f"{size} encoder: further left and lower is better")
    others = [(row.bits, row.errors_with_outliers[place]) for row in kinds]
    label(axes, [(row.kind, row.bits, row.errors[place]) for row in kinds], others)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
