"""The results of a parity measurement: as data, as tables for a terminal and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nai_t5_core.model.packing import PADDING_POLICIES, PaddingPolicy
from nai_t5_core.weights.whole_files import replacing

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

OWN = "comfy-nai-t5"


@dataclass(frozen=True)
class Difference:
    """How far one implementation is from the reference at real positions.

    Attributes:
        quantiles: of the absolute difference over all values, by name such as ``"0.99"``.
        largest: the largest absolute difference; not finite where the output is not, and some quantiles with it.
        relative: ``largest`` divided by the largest absolute value of the reference.
        tolerance: the largest ``relative`` allowed; infinite where any is.
    """

    name: str
    dtype: str
    quantiles: dict[str, float]
    largest: float
    relative: float
    tolerance: float = math.inf

    @property
    def passed(self) -> bool:
        return self.relative <= self.tolerance


@dataclass(frozen=True)
class LayerDifferences:
    """How far one implementation's residual stream is from the reference's: after the embedding, and after each layer.

    ``medians`` and ``largest`` are those of the absolute difference at real positions, divided by the root mean square
    of the reference's residual there.
    """

    name: str
    dtype: str
    medians: tuple[float, ...]
    largest: tuple[float, ...]

    @property
    def first_not_finite(self) -> str | None:
        """Where the first NaN or infinity is: ``"embedding"``, ``"layer 3"``; None where there is none."""
        index = next((index for index, value in enumerate(self.largest) if not math.isfinite(value)), None)
        return None if index is None else "embedding" if index == 0 else f"layer {index - 1}"


@dataclass(frozen=True)
class PolicyCheck:
    """The largest relative difference of one of our layouts from the expected output, under one padding policy."""

    name: str
    dtype: str
    padding: PaddingPolicy
    relative: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.relative <= self.tolerance


@dataclass(frozen=True)
class ParityReport:
    """The result of :func:`nai_t5_core.bench.parity.measure_parity`.

    ``reference`` describes the reference, ``largest_value`` is its largest absolute value, ``layers`` is empty unless
    asked for, and ``skipped`` names the peers that could not run in a dtype, and why. ``decoder_hidden`` and ``logits``
    are results of :func:`nai_t5_core.bench.decoder_parity.measure_decoder_parity`, empty unless asked for.
    """

    kind: str
    reference: str
    prompt_lengths: tuple[int, ...]
    largest_value: float
    differences: tuple[Difference, ...]
    layers: tuple[LayerDifferences, ...]
    policies: tuple[PolicyCheck, ...]
    skipped: tuple[str, ...]
    decoder_hidden: tuple[Difference, ...] = ()
    logits: tuple[Difference, ...] = ()

    @property
    def failures(self) -> list[str]:
        """Which of our results exceed their tolerance, in words."""
        policies = [f"{check.name} {check.dtype} {check.padding}" for check in self.policies if not check.passed]
        return policies + [
            f"{item.name} {item.dtype} {where}"
            for where, items in (("decoder", self.decoder_hidden), ("logits", self.logits))
            for item in items
            if not item.passed
        ]

    @property
    def passed(self) -> bool:
        """Whether every padding policy of ours, and our decoder, are within their tolerances."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; differences that are not finite are None."""
        policies = [{**asdict(check), "passed": check.passed} for check in self.policies]
        layers = [{**asdict(item), "first_not_finite": item.first_not_finite} for item in self.layers]
        return dict(without_nan({**asdict(self), "layers": layers, "policies": policies, "passed": self.passed}))


def without_nan(value: Any) -> Any:
    """Nested lists and dictionaries with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(report: ParityReport) -> RenderableType:
    """The report as tables for a terminal."""
    from rich.console import Group
    from rich.text import Text

    title = (
        f"{report.kind} against {report.reference}; prompts of {', '.join(map(str, report.prompt_lengths))} tokens; "
        f"largest value {report.largest_value:.3g}"
    )
    good, bad = "every padding policy is within its tolerance", f"outside the tolerance: {', '.join(report.failures)}"
    if report.decoder_hidden:
        good = good.replace("is within its tolerance", "and the decoder are within their tolerances")
    verdict = Text(good, style="green") if report.passed else Text(bad, style="red")
    notes = [Text(f"skipped {reason}") for reason in report.skipped]
    dtypes = dict.fromkeys(item.dtype for item in report.differences)
    measured = (
        ("absolute difference at real positions", report.differences),
        ("the same of the decoder's hidden states", report.decoder_hidden),
        ("the same of the logits", report.logits),
    )
    tables = [_difference_table(items, dtype, title) for title, items in measured if items for dtype in dtypes]
    if report.layers:
        tables += [_layer_table(report, dtype) for dtype in dtypes]
    return Group(Text(title), *tables, _policy_table(report), *notes, verdict)


def _difference_table(measured: Sequence[Difference], dtype: str, title: str) -> RenderableType:
    from rich.table import Table

    items = [item for item in measured if item.dtype == dtype]
    table = Table(
        "quantile",
        *(_heading(item.name) for item in items),
        title=f"{dtype}: {title}",
        title_justify="left",
    )
    for quantile in items[0].quantiles:
        table.add_row(quantile, *(_cell(item.quantiles[quantile]) for item in items))
    table.add_row("max", *(_cell(item.largest) for item in items))
    table.add_row("max, relative", *(_cell(item.relative) for item in items))
    return table


def _layer_table(report: ParityReport, dtype: str) -> RenderableType:
    """The median difference after every layer, and the first layer that is not finite."""
    from rich.table import Table

    items = [item for item in report.layers if item.dtype == dtype]
    title = f"{dtype}: residual after each layer, median difference / its root mean square"
    table = Table("", *(_heading(item.name) for item in items), title=title, title_justify="left")
    for index in range(len(items[0].medians)):
        cells = (_cell(item.medians[index]) for item in items)
        table.add_row("embedding" if index == 0 else f"layer {index - 1}", *cells)
    if any(item.first_not_finite for item in items):
        table.add_section()
        table.add_row("first not finite", *(item.first_not_finite or "none" for item in items))
    return table


def _policy_table(report: ParityReport) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    headings = ("dtype", "layout", *PADDING_POLICIES, "tolerance")
    table = Table(*headings, title="padding policies, relative", title_justify="left")
    for (dtype, name), group in groupby(report.policies, key=lambda check: (check.dtype, check.name)):
        checks = list(group)
        cells = [Text(f"{check.relative:.1e}", "green" if check.passed else "red") for check in checks]
        table.add_row(dtype, name.removeprefix(f"{OWN} "), *cells, f"{checks[0].tolerance:.0e}")
    return table


def _heading(name: str) -> str:
    return name.replace(f"{OWN} ", "ours\n")


def _cell(value: float) -> Text:
    from rich.text import Text

    return Text(f"{value:.1e}") if math.isfinite(value) else Text(f"{value}", "red")


def plot(report: ParityReport, path: Path) -> None:
    """Draws the quantiles of every implementation's difference and, where measured, its growth by layer, into a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('the plot needs matplotlib: pip install "comfy-nai-t5[plot]"') from error
    panels = 1 + bool(report.layers) + bool(report.logits)
    figure = Figure(figsize=(1 + 5.5 * panels, 4.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _plot_quantiles(axes[0], report.differences, "share of the output values")
    if report.layers:
        _plot_layers(axes[1], report)
    if report.logits:
        _plot_quantiles(axes[-1], report.logits, "share of the decoder's logits")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", ncols=3, loc="outside lower center")
    what = "Encoder and decoder error" if report.logits else "Encoder error"
    figure.suptitle(f"{what}, {report.kind}, against float64: lower is better")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


_COLORS = {OWN: "tab:blue", "transformers": "tab:orange", "nai-t5": "tab:green"}
_STYLES = {"float16": "-", "bfloat16": "--", "float32": ":", "float64": "-."}


def _plotted(name: str) -> bool:
    """Whether an implementation is drawn; of ours only one, since its layouts differ by less than a line's width."""
    return not name.startswith(OWN) or name == f"{OWN} fused"


def _plot_quantiles(axes: Any, measured: Sequence[Difference], label: str) -> None:
    for item in filter(lambda item: _plotted(item.name), measured):
        name = item.name.removesuffix(" fused")
        labels = [f"{float(quantile) * 100:g}%" for quantile in item.quantiles]
        axes.plot(
            [*labels, "max"],
            [*item.quantiles.values(), item.largest],
            color=_COLORS.get(name),
            linestyle=_STYLES[item.dtype],
            marker="o",
            markersize=3,
            label=f"{name}, {item.dtype}",
        )
    axes.set(yscale="log", xlabel=label, ylabel="absolute difference is at most")
    axes.grid(alpha=0.3)


def _plot_layers(axes: Any, report: ParityReport) -> None:
    for item in filter(lambda item: _plotted(item.name), report.layers):
        color = _COLORS.get(item.name.removesuffix(" fused"))
        # After the embedding there may be no difference at all, which a logarithmic axis cannot show.
        medians = [value or math.nan for value in item.medians]
        axes.plot(medians, color=color, linestyle=_STYLES[item.dtype], marker="o", markersize=3)
    axes.set(yscale="log", xlabel="layers passed", ylabel="median difference of the residual, relative")
    axes.grid(alpha=0.3)
