"""How fast our encoder is beside others: the same random weights, one process, taking turns.

Loading and cold start are measured in fresh processes, see :mod:`nai_t5_core.bench.loading`.
"""

from nai_t5_core.bench.cases import CASES, Case, cases_named
from nai_t5_core.bench.plot import plot
from nai_t5_core.bench.report import markdown, render
from nai_t5_core.bench.results import BenchReport
from nai_t5_core.bench.run import run_bench

__all__ = ["CASES", "BenchReport", "Case", "cases_named", "markdown", "plot", "render", "run_bench"]
