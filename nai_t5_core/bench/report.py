"""A benchmark as tables, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from nai_t5_core.bench.results import BenchReport, CaseResult, LoadingReport, Spread, Timing
from nai_t5_core.parity_report import OWN

if TYPE_CHECKING:
    from rich.console import RenderableType


class _Table(NamedTuple):
    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


def render(report: BenchReport) -> RenderableType:
    """The report as tables for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text(_headline(report))]
    for title, headings, rows in _tables(report):
        table = Table(title=title, title_justify="left", show_lines=True)
        for heading, *cells in zip(headings, *rows, strict=True):
            # In a narrow terminal, columns shrink to their longest word and no further.
            words = " ".join((heading, *cells)).split()
            table.add_column(heading, min_width=max(map(len, words)))
        for row in rows:
            table.add_row(*row)
        parts.append(table)
    return Group(*parts, *(Text(line) for line in _notes(report)))


def markdown(report: BenchReport) -> str:
    """The report as Markdown; first a summary with a column for each implementation."""
    summary = [_summary(report)] if report.cases else []
    parts = [_headline(report)]
    for title, headings, rows in [*summary, *_tables(report)]:
        lines = [headings, ("---",) * len(headings), *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"**{title}**\n\n{table}")
    return "\n\n".join([*parts, *_notes(report)]) + "\n"


def _headline(report: BenchReport) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        f"{report.size}, encoder, {report.dtype}, {report.device}, {report.threads} threads; "
        f"medians of {report.repeats} rounds (lowest–highest), random weights; {versions}"
    )


def _tables(report: BenchReport) -> Iterator[_Table]:
    if report.cases:
        yield from map(_timings, report.cases)
        yield _call_memory(report)
        yield _machine(report)
    if report.loading is not None:
        yield _cold_starts(report.loading)
        if report.loading.memory:
            yield _memory(report.loading)


def _summary(report: BenchReport) -> _Table:
    names = [timing.name for timing in report.cases[0].timings]
    rows: list[tuple[str, ...]] = [
        (result.case.name, *(_time_or_ratio(timing) for timing in result.timings)) for result in report.cases
    ]
    return _Table("Time of one call, and how many times longer the others take", ("case", *names), rows)


def _time_or_ratio(timing: Timing) -> str:
    return f"{timing.seconds.median * 1e3:.1f} ms" if timing.name == OWN else f"{timing.ratio.median:.2f}×"


def _timings(result: CaseResult) -> _Table:
    rows: list[tuple[str, ...]] = [
        (
            timing.name,
            _milliseconds(timing.seconds),
            _times(timing.ratio) if timing.name != OWN else "",
            f"{timing.tokens_per_second.median:.0f}",
            "" if timing.flops is None else f"{timing.flops / 1e9:.2f}",
            "" if timing.flops_ratio is None else f"{timing.flops_ratio:.2f}×",
        )
        for timing in result.timings
    ]
    headings = ("", "one call", "ratio to ours", "tokens/s", "GFLOPs", "÷ real")
    return _Table(result.case.name, headings, rows)


def _call_memory(report: BenchReport) -> _Table:
    rows: list[tuple[str, ...]] = [
        (result.case.name, *(_megabytes(timing.peak_memory) for timing in result.timings)) for result in report.cases
    ]
    return _Table("Memory of one call, MB", ("case", *(timing.name for timing in report.cases[0].timings)), rows)


def _megabytes(size: int | None) -> str:
    return "not measured" if size is None else f"{size / 1e6:.1f}"


def _machine(report: BenchReport) -> _Table:
    rows: list[tuple[str, ...]] = [
        (result.case.name, *_limit_cells(result), *_guard_cells(result)) for result in report.cases
    ]
    headings = ("case", "products alone", "share of ours", "check for NaN", "share of ours")
    return _Table("Ours beside this machine's packed products, and what the guard costs", headings, rows)


def _limit_cells(result: CaseResult) -> tuple[str, str]:
    limit = result.limit
    return (_milliseconds(limit.seconds), _percent(limit.reached)) if limit is not None else ("not measured",) * 2


def _guard_cells(result: CaseResult) -> tuple[str, str]:
    microseconds = result.guard.seconds.median * 1e6
    return f"{microseconds:.0f} µs", f"{result.guard.share.median * 100:.2f}%"


def _cold_starts(loading: LoadingReport) -> _Table:
    first = loading.cold_starts[0].seconds.median
    rows: list[tuple[str, ...]] = [("import torch alone", _seconds(loading.import_torch), "", "", "", "")]
    for item in loading.cold_starts:
        phases = (f"{item.phases[name]:.2f} s" for name in ("imports", "load", "first"))
        rows.append((item.name, _seconds(item.seconds), f"{item.seconds.median / first:.2f}×", *phases))
    headings = ("", "seconds", "ratio to the first", "imports", "load", "first embedding")
    return _Table("Process start to first embedding of 32 tokens, files in the system's cache", headings, rows)


def _memory(loading: LoadingReport) -> _Table:
    rows: list[tuple[str, ...]] = []
    for item in loading.memory:
        figures = (item.peak, item.anonymous, item.peak_first, item.anonymous_first, item.limit)
        cells = (f"{figure / loading.weights:.2f}" for figure in figures)
        rows.append((item.name, *cells, "yes" if item.holds else "NO"))
    headings = ("", "load", "load, anonymous", "and first embedding", "and first, anonymous", "limit", "holds")
    return _Table("Peak memory, divided by the weights", headings, rows)


def _notes(report: BenchReport) -> Iterator[str]:
    for reason in report.skipped:
        yield f"skipped {reason}"
    if report.cases:
        yield "tokens/s: real tokens, pads do not count; ÷ real: FLOPs divided by those of the real tokens alone"
        yield "memory of one call: what torch allocated at once meanwhile, with its result and without the weights"
    if report.loading is not None and report.loading.memory:
        weights, work = report.loading.weights / 1e6, report.loading.work_space / 1e6
        yield f"weights {weights:.0f} MB, float32 work space of the largest tensor {work:.0f} MB"
        yield f"peak memory: {report.loading.method}; anonymous memory: looked at every millisecond"


def _milliseconds(spread: Spread) -> str:
    digits = 0 if spread.high >= 1 else 1
    median, low, high = (f"{seconds * 1e3:.{digits}f}" for seconds in (spread.median, spread.low, spread.high))
    return f"{median} ms ({low}–{high})"


def _seconds(spread: Spread) -> str:
    return f"{spread.median:.2f} s ({spread.low:.2f}–{spread.high:.2f})"


def _times(spread: Spread) -> str:
    return f"{spread.median:.2f}× ({spread.low:.2f}–{spread.high:.2f})"


def _percent(spread: Spread) -> str:
    return f"{spread.median * 100:.0f}% ({spread.low * 100:.0f}–{spread.high * 100:.0f})"
