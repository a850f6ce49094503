"""The whole examination: every step that applies, one after the other, and what they found together."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from nai_t5_core.bench.doctor.model import model_of
from nai_t5_core.bench.doctor.settings import DoctorSettings
from nai_t5_core.bench.doctor.steps import TRIAL, Step, all_steps
from nai_t5_core.bench.doctor.worker import StepProcess
from nai_t5_core.model.precision import resolve_device


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        outcomes: for each step by name: ``status`` (``ok``, ``wrong``, ``failed``, ``crashed``, ``late``,
            ``left out``), ``title``, ``seconds``, and ``data`` or ``message``.
        device: the type of device that was examined: the CPU where the one that was asked for does not compute.
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

    Where the device does not compute (no driver, none of its kind, taken by another program), that is reported as well,
    and the CPU is examined in its place.

    Raises:
        ValueError: an unknown step, model or kind of device, steps that are for other devices, or no time.
        OSError: the results cannot be written.
    """
    tell = progress or (lambda _: None)
    # What cannot be examined is refused before any work.
    if not settings.budget > 0:
        raise ValueError(f"budget={settings.budget:g}; a number of seconds above 0 is needed")
    device = _device(settings.device)
    if settings.model is not None:
        model_of(settings.model, torch.float32, device)
    steps = _chosen(settings, device.type)
    if settings.results is not None:
        settings.results.open("a").close()
    outcomes: dict[str, dict[str, Any]] = {}
    ends_at = time.monotonic() + settings.budget
    process = StepProcess(settings)
    try:
        while steps:
            step = steps.pop(0)
            tell(step.title)
            left = ends_at - time.monotonic()
            outcome = _judged(process.run(step.name, min(step.deadline, left)) if left > 1 else _LEFT_OUT)
            is_over = outcome["status"] == "late" and left < step.deadline
            if is_over:
                outcome["message"] += ", when the time for everything was over"
            if step.name == TRIAL and not is_over and outcome["status"] not in ("ok", "left out"):
                reason = outcome.get("message", "it computes wrongly")
                outcome |= {"status": "failed", "message": f"{reason}; the CPU is examined in its place"}
                device, settings = torch.device("cpu"), replace(settings, device="cpu")
                process.end()
                process = StepProcess(settings)
                steps = [each for each in _asked_for(settings) if device.type in each.devices]
            outcomes[step.name] = {"title": step.title, **outcome}
            _write_down(settings, step.name, outcomes[step.name])
    finally:
        process.end()
    return Diagnosis(outcomes, device.type)


_LEFT_OUT = {"status": "left out", "message": "the time that was given was over", "seconds": 0.0}


def _device(name: str) -> torch.device:
    """The device to examine. It is not touched: a card may serve one process alone, and that is the one of the steps.

    Raises:
        ValueError: there is no such kind of device, or there are no steps for it.
    """
    kinds = sorted({kind for step in all_steps() for kind in step.devices})
    try:
        device = resolve_device(name) if name == "auto" else torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in kinds:
        raise ValueError(
            f"device {name!r} cannot be examined; allowed: auto, {', '.join(kinds)}, or one of several: cuda:1"
        )
    return device


def _chosen(settings: DoctorSettings, device_type: str) -> list[Step]:
    """The steps to run, after the one that tries the device, if it is another than the CPU."""
    steps = {step.name: step for step in all_steps()}
    if unknown := set(settings.only) - set(steps):
        allowed = ", ".join(name for name, step in steps.items() if device_type in step.devices)
        raise ValueError(f"unknown steps {sorted(unknown)}; allowed on {device_type}: {allowed}")
    for name in settings.only:
        if device_type not in steps[name].devices:
            raise ValueError(f"the step {name} is for {' and '.join(steps[name].devices)}, and this is {device_type}")
    trials = [steps[TRIAL]] if device_type in steps[TRIAL].devices else []
    return trials + [step for step in _asked_for(settings) if device_type in step.devices]


def _asked_for(settings: DoctorSettings) -> list[Step]:
    """For whatever device, without the one that tries it."""
    steps = [step for step in all_steps() if step.name != TRIAL]
    if settings.only:
        return [step for step in steps if step.name in settings.only]
    return [step for step in steps if settings.full or not step.only_full]


def _judged(outcome: dict[str, Any]) -> dict[str, Any]:
    is_wrong = outcome["status"] == "ok" and outcome["data"].get("wrong")
    return {**outcome, "status": "wrong"} if is_wrong else outcome


def _write_down(settings: DoctorSettings, name: str, outcome: dict[str, Any]) -> None:
    if settings.results is not None:
        with settings.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": name, **outcome}) + "\n")
