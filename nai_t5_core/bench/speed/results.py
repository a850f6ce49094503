"""The results of a benchmark, as data."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nai_t5_core.bench.parity_report import without_nan
from nai_t5_core.bench.speed.cases import Case


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def of_ratio(cls, values: Sequence[float], others: Sequence[float]) -> Spread:
        """The ratio of the medians, with the lowest and highest ratio of the single rounds."""
        single = [a / b for a, b in zip(values, others, strict=True)]
        return cls(statistics.median(values) / statistics.median(others), min(single), max(single))


@dataclass(frozen=True)
class Timing:
    """One implementation in one case.

    Attributes:
        seconds: of one call.
        ratio: how many times longer than ours it takes.
        tokens_per_second: real tokens per second; pads do not count.
        flops: floating-point operations of the matrix products and attention of one call; None for our compiled
            encoder, whose attention torch's counter cannot see.
        flops_ratio: ``flops`` divided by those of the real tokens alone.
        peak_memory: the peak of bytes allocated during the call, with its result and without the weights; None on
            devices where torch cannot measure it.
        difference: largest difference from ours at real positions, relative to our largest value; a check that all
            compute the same.
    """

    name: str
    seconds: Spread
    ratio: Spread
    tokens_per_second: Spread
    flops: int | None
    flops_ratio: float | None
    peak_memory: int | None
    difference: float


@dataclass(frozen=True)
class Limit:
    """The time of the projections alone by oneDNN on this machine.

    Attributes:
        seconds: of prepacked products of the projections' shapes, with as many bytes of weights.
        reached: that time divided by the time of our call; 1 means that the rest of the encoder costs nothing.
    """

    seconds: Spread
    reached: Spread


@dataclass(frozen=True)
class LeastTime:
    """The time that no program can undercut on this processor, for one of our variants.

    Attributes:
        name: the variant.
        rate: operations per second of the instruction that multiplies the variant's projections, on registers only.
        seconds: the time of the variant's operations at that rate; attention is never computed in 8 bits.
        reached: that time divided by the time of the variant's call.
    """

    name: str
    rate: Spread
    seconds: Spread
    reached: Spread


@dataclass(frozen=True)
class GuardCost:
    """The time of the check for NaN and infinity: ``seconds``, and the ``share`` of our call."""

    seconds: Spread
    share: Spread


@dataclass(frozen=True)
class CaseResult:
    """One case: our timing first, then the others.

    ``limit`` is None and ``least`` empty where they cannot be measured.
    """

    case: Case
    timings: tuple[Timing, ...]
    limit: Limit | None
    least: tuple[LeastTime, ...]
    guard: GuardCost


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
        peak, anonymous: while loading; all resident memory, and the part of it that is not backed by a file.
        peak_first, anonymous_first: the same up to the end of the first encode, which reads a mapped file.
        limit: the most that loading is designed to use.
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
        memory: empty where the system cannot measure it; ``method`` says where the figures come from.
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
    """The result of :func:`nai_t5_core.bench.speed.run_bench`. ``skipped``: what could not run, and why."""

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
