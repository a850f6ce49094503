"""A benchmark as a picture: how many times longer than ours each implementation takes, case by case."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from nai_t5_core.bench.comfyui_peer import COMFYUI
from nai_t5_core.bench.parity_report import OWN
from nai_t5_core.bench.speed.results import BenchReport, CaseResult
from nai_t5_core.bench.speed.variants import COMPILED, INT8, NOT_PREPACKED
from nai_t5_core.weights.whole_files import replacing

_GROUP_WIDTH = 0.84
# By the variant of an implementation, which is the end of its name.
_HATCHES = {COMPILED: "///", NOT_PREPACKED.removeprefix(OWN): "...", INT8.removeprefix(OWN): "xxx"}
_COLORS = {OWN: "tab:blue", "transformers": "tab:orange", "nai-t5": "tab:green", COMFYUI: "tab:red"}


def plot(report: BenchReport, path: Path) -> None:
    """Draws grouped bars of the times relative to ours, on a logarithmic axis, into a PNG.

    Raises:
        ValueError: matplotlib is not installed, or no case was measured.
    """
    if not report.cases:
        raise ValueError("there is nothing to plot: no case was measured")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('the plot needs matplotlib: pip install "comfy-nai-t5[plot]"') from error
    names = [timing.name for timing in report.cases[0].timings if timing.name != OWN]
    figure = Figure(figsize=(max(6.0, 2 + len(report.cases) * (0.9 + 0.32 * len(names))), 4.8), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(names):
        _draw_bars(axes, report, name, index - (len(names) - 1) / 2, _GROUP_WIDTH / max(1, len(names)))
    axes.axhline(1, color=_color(OWN), linewidth=1.6, label=f"{OWN} = 1")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}×")
    axes.set_ylabel(f"time, divided by that of {OWN}")
    axes.set_xticks(range(len(report.cases)), [_caption(result) for result in report.cases], fontsize="small")
    axes.margins(y=0.12)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(fontsize="small", ncols=4, loc="outside lower center")
    figure.suptitle(
        f"{report.size} encoder, {report.dtype}, {report.device}, threads: {report.threads}; lower is better"
    )
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _draw_bars(axes: Any, report: BenchReport, name: str, place: float, width: float) -> None:
    """The bars of one implementation, ``place`` bars from the middle of each group.

    The bars start at 1, our time; those of faster implementations extend below it.
    """
    places = [case + place * width for case in range(len(report.cases))]
    ratios = [timing.ratio.median for result in report.cases for timing in result.timings if timing.name == name]
    heights = [ratio - 1 for ratio in ratios]
    hatch = next((hatch for ending, hatch in _HATCHES.items() if name.endswith(ending)), None)
    bars = axes.bar(
        places, heights, width * 0.94, bottom=1, color=_color(name), hatch=hatch, edgecolor="white", label=name
    )
    axes.bar_label(bars, [f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}" for ratio in ratios], fontsize="x-small")


def _color(name: str) -> str | None:
    """The color of an implementation; its variants share it."""
    return _COLORS.get(name.partition(",")[0])


def _caption(result: CaseResult) -> str:
    """The case and our time."""
    return f"{textwrap.fill(result.case.name, 20)}\nours {result.timings[0].seconds.median * 1e3:.1f} ms"
