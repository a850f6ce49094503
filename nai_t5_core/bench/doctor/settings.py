"""What the doctor is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DoctorSettings:
    """What is examined, and for how long.

    Attributes:
        device: as :func:`nai_t5_core.model.precision.resolve_device` takes it.
        size: the published size that is timed, with random weights; None chooses one for the device.
        full: also the largest size, peers, compiled graphs, and everything that takes minutes.
        budget: seconds for all steps; those that no longer fit are left out, and reported.
        only: the steps to run, by name; all that apply by default.
        results: a file to which each step's outcome is appended when the step ends, as a line of JSON.
    """

    device: str = "auto"
    size: str | None = None
    full: bool = False
    budget: float = 480.0
    only: tuple[str, ...] = ()
    results: Path | None = None
