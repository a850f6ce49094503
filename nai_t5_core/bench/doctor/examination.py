"""The whole examination: every step that applies, one after the other, and what they found together."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nai_t5_core.bench.doctor.settings import DoctorSettings
from nai_t5_core.bench.doctor.steps import Step, all_steps
from nai_t5_core.bench.doctor.worker import StepProcess


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        outcomes: for each step by name: ``status`` (``ok``, ``wrong``, ``failed``, ``crashed``, ``late``,
            ``left out``), ``title``, ``seconds``, and ``data`` or ``message``.
        device: the type of device that was examined.
    """

    outcomes: dict[str, dict[str, Any]]
    device: str

    @property
    def passed(self) -> bool:
        """Whether no number is wrong, and no step failed or crashed."""
        return all(outcome["status"] in ("ok", "late", "left out") for outcome in self.outcomes.values())

    def data(self, step: str) -> dict[str, Any]:
        """What a step found; empty if it did not run or found nothing."""
        found: dict[str, Any] = self.outcomes.get(step, {}).get("data", {})
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"passed": self.passed, "device": self.device, "steps": self.outcomes}


def examine_machine(settings: DoctorSettings, progress: Callable[[str], None] | None = None) -> Diagnosis:
    """Runs the steps; one that fails, hangs or crashes is reported, and the others run.

    Raises:
        ValueError: an unknown step, size or device, steps that are for other devices, or no time.
        OSError: the results cannot be written.
    """
    from nai_t5_core.bench.doctor.patient import Patient

    tell = progress or (lambda _: None)
    # What cannot be examined is refused before any work.
    if not settings.budget > 0:
        raise ValueError(f"budget={settings.budget:g}; a number of seconds above 0 is needed")
    patient = Patient(settings)
    if settings.size is not None:
        _ = patient.config
    steps = _chosen(settings, patient.device.type)
    if settings.results is not None:
        settings.results.open("a").close()
    outcomes: dict[str, dict[str, Any]] = {}
    ends_at = time.monotonic() + settings.budget
    process = StepProcess(settings)
    try:
        for step in steps:
            tell(step.title)
            left = ends_at - time.monotonic()
            outcome = process.run(step.name, min(step.deadline, left)) if left > 1 else _LEFT_OUT
            outcomes[step.name] = {"title": step.title, **_judged(outcome)}
            _write_down(settings, step.name, outcomes[step.name])
    finally:
        process.end()
    return Diagnosis(outcomes, patient.device.type)


_LEFT_OUT = {"status": "left out", "message": "the time that was given was over", "seconds": 0.0}


def _chosen(settings: DoctorSettings, device_type: str) -> list[Step]:
    steps = {step.name: step for step in all_steps()}
    if unknown := set(settings.only) - set(steps):
        raise ValueError(f"unknown steps {sorted(unknown)}; allowed: {', '.join(steps)}")
    for name in settings.only:
        if device_type not in steps[name].devices:
            raise ValueError(f"the step {name} is for {' and '.join(steps[name].devices)}, and this is {device_type}")
    if settings.only:
        return [step for name, step in steps.items() if name in settings.only]
    return [step for step in steps.values() if device_type in step.devices and (settings.full or not step.only_full)]


def _judged(outcome: dict[str, Any]) -> dict[str, Any]:
    is_wrong = outcome["status"] == "ok" and outcome["data"].get("wrong")
    return {**outcome, "status": "wrong"} if is_wrong else outcome


def _write_down(settings: DoctorSettings, name: str, outcome: dict[str, Any]) -> None:
    if settings.results is not None:
        with settings.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": name, **outcome}) + "\n")
