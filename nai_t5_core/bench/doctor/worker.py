"""Runs steps in a child process, so that one that hangs, crashes or loses its device does not end the examination."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from nai_t5_core.bench.doctor.settings import DoctorSettings
from nai_t5_core.bench.doctor.steps import Step, all_steps

_PATIENCE = 10.0  # seconds to wait for a process to end after it was asked to


class StepProcess:
    """Runs steps in a child process, which is started anew after a step that crashed, hung or lost the device."""

    def __init__(self, settings: DoctorSettings, known_steps: Callable[[], tuple[Step, ...]] = all_steps) -> None:
        self._settings, self._known_steps = settings, known_steps
        self._process: Any = None
        self._connection: Connection | None = None

    def run(self, name: str, deadline: float) -> dict[str, Any]:
        """What a step found, or what went wrong: ``status``, ``seconds``, and ``data`` or ``message``.

        ``status`` is ``"ok"``, ``"failed"`` (an exception), ``"crashed"`` (the process died) or ``"late"``.
        """
        connection = self._connected()
        started = time.perf_counter()
        connection.send(name)
        try:
            outcome: dict[str, Any]
            if not connection.poll(deadline):
                self.end()
                outcome = {"status": "late", "message": f"stopped after {deadline:.0f} seconds"}
            else:
                outcome = connection.recv()
        except (EOFError, OSError):
            self._process.join(_PATIENCE)
            outcome = {"status": "crashed", "message": f"its process ended with status {self._process.exitcode}"}
            self.end()
        if outcome.pop("device_is_lost", False):
            self.end()
        return {**outcome, "seconds": time.perf_counter() - started}

    def end(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join(_PATIENCE)
        self._process = self._connection = None

    def _connected(self) -> Connection:
        if self._connection is None:
            context = get_context("spawn")
            ours, theirs = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(theirs, self._settings, self._known_steps), daemon=True
            )
            self._process.start()
            theirs.close()
            self._connection = ours
        return self._connection


def _serve(connection: Connection, settings: DoctorSettings, known_steps: Callable[[], tuple[Step, ...]]) -> None:
    from nai_t5_core.bench.doctor.patient import Patient

    steps = {step.name: step.run for step in known_steps()}
    made = cache(lambda: Patient(settings))
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        connection.send(_outcome(steps[name], made))


def _outcome(run: Callable[[Any], dict[str, Any]], patient: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"status": "ok", "data": run(patient())}
    except Exception as error:
        kind, text = type(error).__name__, str(error)
        where = [
            f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
        ]
        return {
            "status": "failed",
            "message": f"{kind}: {text.strip()[:1500]}",
            "where": " > ".join(where[-8:]),
            # After such an error every later CUDA call of the process fails as well.
            "device_is_lost": "CUDA error" in text or "device-side assert" in text,
        }
