"""Times of our encoder and generation beside others': the same random weights, in one process, taking turns.

Loading and cold start are measured in fresh processes, see :mod:`nai_t5_core.bench.speed.loading`.
"""

from nai_t5_core.bench.speed.cases import CASES, Case, cases_named
from nai_t5_core.bench.speed.generation import (
    GENERATION_CASES,
    GenerationReport,
    bench_generation,
    generation_cases_named,
)
from nai_t5_core.bench.speed.generation_report import generation_markdown, render_generation
from nai_t5_core.bench.speed.plot import plot
from nai_t5_core.bench.speed.report import markdown, render
from nai_t5_core.bench.speed.results import BenchReport
from nai_t5_core.bench.speed.run import run_bench

__all__ = [
    "CASES",
    "GENERATION_CASES",
    "BenchReport",
    "Case",
    "GenerationReport",
    "bench_generation",
    "cases_named",
    "generation_cases_named",
    "generation_markdown",
    "markdown",
    "plot",
    "render",
    "render_generation",
    "run_bench",
]
