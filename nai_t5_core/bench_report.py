"""What a benchmark found, as data, as tables for a terminal and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nai_t5_core.packing import PaddingPolicy
from nai_t5_core.parity_report import OWN, without_nan

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Case:
    """One batch to encode: ``prompt_lengths`` real tokens each, padded to ``length``.

    ``padding`` is our policy for the pads; None gives everybody the batch without a mask.
    """

    name: str
    prompt_lengths: tuple[int, ...]
    length: int
    padding: PaddingPolicy | None


@dataclass(frozen=True)
class CaseResult:
    """Timings of one case.

    Attributes:
        seconds: of one call, by implementation.
        ratios: how many times longer each of the others takes than ours: of the medians, with the lowest and highest of
            the single rounds.
        differences: largest difference of each of the others from ours at real positions, relative to our largest
            value; a check that all compute the same.
    """

    case: Case
    seconds: dict[str, Spread]
    ratios: dict[str, Spread]
    differences: dict[str, float]


@dataclass(frozen=True)
class ColdStart:
    """Seconds from the start of a process to its first embedding, and the medians of the phases within."""

    name: str
    seconds: Spread
    phases: dict[str, float]


@dataclass(frozen=True)
class LoadMemory:
    """Peaks above the process before the load, in bytes.

    Attributes:
        peak, anonymous: while loading; all resident memory, and the part of it that no file backs.
        peak_first, anonymous_first: the same up to and with the first embedding, since a mapped file is read then.
        limit: what the design allows.
    """

    name: str
    peak: int
    anonymous: int
    peak_first: int
    anonymous_first: int
    limit: int

    @property
    def holds(self) -> bool:
        return self.peak_first <= self.limit


@dataclass(frozen=True)
class LoadingReport:
    """What loading costs.

    Attributes:
        import_torch: seconds of a process that only imports torch.
        memory: empty where the system cannot tell; ``method`` says where the figures come from.
        weights: bytes of the weights in their final dtypes; ``work_space`` those of the largest tensor in float32.
    """

    import_torch: Spread
    cold_starts: tuple[ColdStart, ...]
    memory: tuple[LoadMemory, ...]
    method: str
    weights: int
    work_space: int


@dataclass(frozen=True)
class BenchReport:
    """What :func:`nai_t5_core.bench.run_bench` found, and on what. ``skipped``: peers that could not run, and why."""

    size: str
    dtype: str
    device: str
    threads: int
    repeats: int
    versions: dict[str, str]
    cases: tuple[CaseResult, ...]
    loading: LoadingReport | None
    skipped: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: seconds, bytes and ratios."""
        report = asdict(self)
        if self.loading is not None:
            report["loading"]["memory"] = [{**asdict(item), "holds": item.holds} for item in self.loading.memory]
        return dict(without_nan(report))


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
        table = Table(*headings, title=title, title_justify="left", show_lines=True)
        for row in rows:
            table.add_row(*row)
        parts.append(table)
    return Group(*parts, *(Text(line) for line in _notes(report)))


def markdown(report: BenchReport) -> str:
    """The report as Markdown."""
    parts = [_headline(report)]
    for title, headings, rows in _tables(report):
        lines = [headings, ("---",) * len(headings), *rows]
        table = "\n".join(f"| {' | '.join(line)} |".replace("\n", ", ") for line in lines)
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
        names = list(report.cases[0].seconds)
        rows = [(result.case.name, *(_timing(result, name) for name in names)) for result in report.cases]
        yield _Table("One call, and how many times longer than ours", ("case", *names), rows)
    if report.loading is not None:
        yield _cold_starts(report.loading)
        if report.loading.memory:
            yield _memory(report.loading)


def _timing(result: CaseResult, name: str) -> str:
    seconds = _milliseconds(result.seconds[name])
    return seconds if name == OWN else f"{seconds}\n{_times(result.ratios[name])}"


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
    if report.loading is not None and report.loading.memory:
        weights, work = report.loading.weights / 1e6, report.loading.work_space / 1e6
        yield f"weights {weights:.0f} MB, float32 work space of the largest tensor {work:.0f} MB"
        yield f"peak memory: {report.loading.method}; anonymous memory: looked at every millisecond"


def _milliseconds(spread: Spread) -> str:
    return f"{spread.median * 1e3:.1f} ms ({spread.low * 1e3:.1f}–{spread.high * 1e3:.1f})"


def _seconds(spread: Spread) -> str:
    return f"{spread.median:.2f} s ({spread.low:.2f}–{spread.high:.2f})"


def _times(spread: Spread) -> str:
    return f"{spread.median:.2f}× ({spread.low:.2f}–{spread.high:.2f})"
