"""What the doctor is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DoctorSettings:
    """What is examined, and for how long.

    Attributes:
        device: ``"auto"``, or a CPU, a CUDA or an MPS device by torch's name.
        model: what is timed: a published size, with random weights, or the encoder of a hub id, a folder or a file;
            None chooses a size for the device.
        full: also the largest size, peers, compiled graphs, and everything that takes minutes.
        budget: seconds for all steps; those that no longer fit are left out, and reported.
        only: the steps to run, by name; all that apply by default.
        results: a file to which each step's outcome is appended when the step ends, as a line of JSON.
    """

    device: str = "auto"
    model: str | None = None
    full: bool = False
    budget: float = 480.0
    only: tuple[str, ...] = ()
    results: Path | None = None
