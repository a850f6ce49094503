"""A real ComfyUI, given by COMFYUI_PATH, with toy text encoders of every family it knows.

ComfyUI is not installed but run from its checkout, and takes over ``sys.path``; so these tests want a process, and an
environment with its requirements, of their own: ``COMFYUI_PATH=… python -m pytest tests/comfyui``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

COMFYUI = os.environ.get("COMFYUI_PATH")
if COMFYUI is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_ignore_collect() -> None:
    """Keeps the hook point of this folder explicit: see collect_ignore_glob above."""
