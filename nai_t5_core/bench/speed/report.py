"""A benchmark as tables, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nai_t5_core.bench.parity_report import OWN
from nai_t5_core.bench.speed.results import BenchReport, CaseResult, LeastTime, LoadingReport, Timing
from nai_t5_core.bench.speed.tables import Table, as_markdown, for_terminal, milliseconds, percent, seconds, times

if TYPE_CHECKING:
    from rich.console import Group


def render(report: BenchReport) -> Group:
    """The report as tables for a terminal."""
    return for_terminal(_headline(report), _tables(report), _notes(report))


def markdown(report: BenchReport) -> str:
    """The report as Markdown; first a summary with a column for each implementation."""
    summary = [_summary(report)] if report.cases else []
    return as_markdown(_headline(report), [*summary, *_tables(report)], _notes(report))


def _headline(report: BenchReport) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        f"{report.size}, encoder, {report.dtype}, {report.device}, {report.threads} threads; "
        f"medians of {report.repeats} rounds (lowest–highest), random weights; {versions}"
    )


def _tables(report: BenchReport) -> Iterator[Table]:
    if report.cases:
        yield from map(_timings, report.cases)
        yield _call_memory(report)
        yield _machine(report)
        if report.cases[0].least:
            yield _least(report)
            if _of_peers(report.cases[0]):
                yield _highest_ratios(report)
    if report.loading is not None:
        yield _cold_starts(report.loading)
        if report.loading.memory:
            yield _memory(report.loading)


def _summary(report: BenchReport) -> Table:
    names = [timing.name for timing in report.cases[0].timings]
    rows: list[tuple[str, ...]] = [
        (result.case.name, *(_time_or_ratio(timing) for timing in result.timings)) for result in report.cases
    ]
    return Table("Time of one call, and how many times longer the others take", ("case", *names), rows)


def _time_or_ratio(timing: Timing) -> str:
    return f"{timing.seconds.median * 1e3:.1f} ms" if timing.name == OWN else f"{timing.ratio.median:.2f}×"


def _timings(result: CaseResult) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            timing.name,
            milliseconds(timing.seconds),
            times(timing.ratio) if timing.name != OWN else "",
            f"{timing.tokens_per_second.median:.0f}",
            "" if timing.flops is None else f"{timing.flops / 1e9:.2f}",
            "" if timing.flops_ratio is None else f"{timing.flops_ratio:.2f}×",
        )
        for timing in result.timings
    ]
    headings = ("", "one call", "ratio to ours", "tokens/s", "GFLOPs", "÷ real")
    return Table(result.case.name, headings, rows)


def _call_memory(report: BenchReport) -> Table:
    rows: list[tuple[str, ...]] = [
        (result.case.name, *(_megabytes(timing.peak_memory) for timing in result.timings)) for result in report.cases
    ]
    return Table("Memory of one call, MB", ("case", *(timing.name for timing in report.cases[0].timings)), rows)


def _megabytes(size: int | None) -> str:
    return "not measured" if size is None else f"{size / 1e6:.1f}"


def _machine(report: BenchReport) -> Table:
    rows: list[tuple[str, ...]] = [
        (result.case.name, *_limit_cells(result), *_guard_cells(result)) for result in report.cases
    ]
    headings = ("case", "oneDNN alone", "share of ours", "check for NaN", "share of ours")
    return Table("Ours beside oneDNN's products alone, packed, and what the guard costs", headings, rows)


def _limit_cells(result: CaseResult) -> tuple[str, str]:
    limit = result.limit
    return (milliseconds(limit.seconds), percent(limit.reached)) if limit is not None else ("not measured",) * 2


def _least(report: BenchReport) -> Table:
    rows: list[tuple[str, ...]] = [
        (result.case.name, *_least_cells(each)) for result in report.cases for each in result.least
    ]
    headings = ("case", "", "G/s at most", "least time", "share of ours")
    return Table("Ours beside what the processor can do at most", headings, rows)


def _least_cells(least: LeastTime) -> tuple[str, ...]:
    return least.name, f"{least.rate.median / 1e9:.0f}", milliseconds(least.seconds), percent(least.reached)


def _highest_ratios(report: BenchReport) -> Table:
    rows: list[tuple[str, ...]] = [
        (result.case.name, *(_ratio_of_highest(timing, result.least[0]) for timing in _of_peers(result)))
        for result in report.cases
    ]
    headings = ("case", *(timing.name for timing in _of_peers(report.cases[0])))
    return Table("How many times longer others take, of how many at most", headings, rows)


def _of_peers(result: CaseResult) -> list[Timing]:
    return [timing for timing in result.timings if not timing.name.startswith(OWN)]


def _ratio_of_highest(timing: Timing, least: LeastTime) -> str:
    """The ratio to our time, and the ratio to our least time, which is the highest possible."""
    return f"{timing.ratio.median:.2f}× of {timing.seconds.median / least.seconds.median:.2f}×"


def _guard_cells(result: CaseResult) -> tuple[str, str]:
    microseconds = result.guard.seconds.median * 1e6
    return f"{microseconds:.0f} µs", f"{result.guard.share.median * 100:.2f}%"


def _cold_starts(loading: LoadingReport) -> Table:
    first = loading.cold_starts[0].seconds.median
    rows: list[tuple[str, ...]] = [("import torch alone", seconds(loading.import_torch), "", "", "", "")]
    for item in loading.cold_starts:
        phases = (f"{item.phases[name]:.2f} s" for name in ("imports", "load", "first"))
        rows.append((item.name, seconds(item.seconds), f"{item.seconds.median / first:.2f}×", *phases))
    headings = ("", "seconds", "ratio to the first", "imports", "load", "first embedding")
    return Table("Process start to first embedding of 32 tokens, files in the system's cache", headings, rows)


def _memory(loading: LoadingReport) -> Table:
    rows: list[tuple[str, ...]] = []
    for item in loading.memory:
        figures = (item.peak, item.anonymous, item.peak_first, item.anonymous_first, item.limit)
        cells = (f"{figure / loading.weights:.2f}" for figure in figures)
        rows.append((item.name, *cells, "yes" if item.holds else "NO"))
    headings = ("", "load", "load, anonymous", "and first embedding", "and first, anonymous", "limit", "holds")
    return Table("Peak memory, divided by the weights", headings, rows)


def _notes(report: BenchReport) -> Iterator[str]:
    for reason in report.skipped:
        yield f"skipped {reason}"
    if report.cases:
        yield "tokens/s: real tokens, pads do not count; ÷ real: FLOPs divided by those of the real tokens alone"
        yield (
            "at most: with operations as fast as the multiplying instruction alone, on registers; least time: our "
            "operations at that rate"
        )
        yield "memory of one call: what torch allocated at once meanwhile, with its result and without the weights"
    if report.loading is not None and report.loading.memory:
        weights, work = report.loading.weights / 1e6, report.loading.work_space / 1e6
        yield f"weights {weights:.0f} MB, float32 work space of the largest tensor {work:.0f} MB"
        yield f"peak memory: {report.loading.method}; anonymous memory: looked at every millisecond"
