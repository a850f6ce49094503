"""Python in a fresh process, which prints what it measured as its last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from threading import Thread
from typing import Any

_BETWEEN_LOOKS = 0.5  # seconds


def found_in_a_fresh_process(module: str, *arguments: str, patience: float) -> dict[str, Any]:
    """What a module of ours prints as JSON. Its arguments are these, and before them the time at which it was started.

    The module calls :func:`end_with_parent`, so that a step that is stopped leaves nothing on the device.

    Args:
        patience: seconds after which it is ended: it would go on using the device when the step is over.

    Raises:
        RuntimeError: the process failed, with the last line that it wrote; or it is late.
    """
    command = [sys.executable, "-m", module, repr(time.time()), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"a fresh process had not encoded after {patience:.0f} seconds") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def end_with_parent() -> None:
    """Ends this process soon after the one that started it has ended; not on Windows, where nothing tells it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_BETWEEN_LOOKS)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
