"""The benchmark of generation as tables, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nai_t5_core.bench.parity_report import OWN
from nai_t5_core.bench.speed.generation import GenerationReport, GenerationResult
from nai_t5_core.bench.speed.tables import Table, as_markdown, for_terminal, seconds, times

if TYPE_CHECKING:
    from rich.console import Group


def render_generation(report: GenerationReport) -> Group:
    """The report as tables for a terminal."""
    return for_terminal(_headline(report), _tables(report), ())


def generation_markdown(report: GenerationReport) -> str:
    """The report as Markdown."""
    return as_markdown(_headline(report), _tables(report), ())


def _headline(report: GenerationReport) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        f"{report.size}, generation, {report.dtype}, {report.device}, {report.threads} threads; prompts of "
        f"{report.prompt_length} tokens, {report.new_tokens} new tokens; medians of {report.repeats} rounds "
        f"(lowest–highest), random weights; {versions}"
    )


def _tables(report: GenerationReport) -> Iterator[Table]:
    yield from map(_timings, report.cases)
    rows = [_memory_cells(result) for result in report.cases]
    headings = ("case", "cache, from the shapes", "allocated", "written", "prompts")
    yield Table("Memory of our keys and values", headings, rows)


def _timings(result: GenerationResult) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            timing.name,
            seconds(timing.seconds),
            times(timing.ratio) if timing.name != OWN else "",
            f"{timing.tokens_per_second.median:.1f}",
            f"{timing.same_texts:.0%}" if timing.name != OWN else "",
        )
        for timing in result.timings
    ]
    return Table(result.case.name, ("", "one call", "ratio to ours", "tokens/s", "same texts"), rows)


def _memory_cells(result: GenerationResult) -> tuple[str, ...]:
    memory = result.memory
    sizes = (memory.computed, memory.allocated, memory.written, memory.prompts)
    return (result.case.name, *(f"{nbytes / 1e6:.2f} MB" for nbytes in sizes))
