"""constraints.txt pins what the demo and the tests install, on every Python, and tells nothing of where it was made."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from newest import drift, locked
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "constraints.txt").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("python", ["3.10.0", "3.11.9", "3.12.1", "3.13.0"])
def test_every_requirement_is_pinned_within_its_range(python: str) -> None:
    pins, elsewhere = locked(LOCK, python), {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    held_back = [line for line in (ROOT / "constraints.in").read_text().splitlines() if not line.startswith("#")]
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"], *held_back, "setuptools>=77"]
    for requirement in map(Requirement, asked):
        if requirement.marker is None or requirement.marker.evaluate(elsewhere):
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_it_holds_pins_and_nothing_else() -> None:
    """No host, no path, no option, no package of torch's CUDA builds."""
    lines = [line for line in LOCK.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+( ; [^/@]+)?", line) for line in lines)
    assert not [line for line in lines if line.startswith(("nvidia-", "cuda-", "triton"))]


def test_what_pins_no_release_is_refused() -> None:
    for lines in ("numpy>=2", "numpy==2.0\nnumpy==2.1", "numpy==2.0 ; python_version >= '3.10'\nNumPy==2.0"):
        with pytest.raises(ValueError, match="every package has to be pinned to one release"):
            locked(lines)


def test_drift_names_what_is_newer_what_came_and_what_went() -> None:
    before = {"torch": "2.13.0", "numpy": "2.0", "gone": "1.0"}
    now = {"torch": "2.13.0+cpu", "numpy": "2.1", "new": "3.0"}
    assert drift(before, now) == ["gone: 1.0 → not there", "new: not there → 3.0", "numpy: 2.0 → 2.1"]
