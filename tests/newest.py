"""What other packages have changed: which releases are not those of constraints.txt, and which tests fail with them.

Run by `python3 dev.py newest`, in an environment that has the newest releases.
"""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dev import CUDA_PACKAGES

ROOT = Path(__file__).parents[1]
# The tests that compare with other packages, read or write their files, or stand in their place. Without the slow ones.
CONCERNED = (
    *("config", "model", "encoder", "sampling", "peers", "lora", "lora_files", "textual_inversion"),
    *("load", "load_t5", "load_gguf", "tokenizer_gguf", "convert", "tokenizer", "cli", "training_config"),
    *("hf", "hf_uses", "hf_weights"),
    *("diffusers_adapter", "diffusers_chunks", "diffusers_families", "diffusers_lora", "diffusers_prompts"),
)


def locked(constraints: str, python: str = "") -> dict[str, str]:
    """Name to release of the lines that hold for this system and this Python, or another, such as ``"3.10.0"``.

    Raises:
        ValueError: a line pins no release, or two lines that hold pin one package.
    """
    elsewhere = {"python_full_version": python, "python_version": python.rpartition(".")[0]} if python else None
    found: dict[str, str] = {}
    for line in constraints.splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is not None and not pin.marker.evaluate(elsewhere):
            continue
        [specifier], name = pin.specifier, canonicalize_name(pin.name)
        if specifier.operator != "==" or name in found:
            raise ValueError(f"{line!r}; every package has to be pinned to one release")
        found[name] = specifier.version
    return found


def drift(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """A line for every package whose release is another, that came, or that went."""
    lines = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name, "not there"), now.get(name, "not there")
        same = name in before and name in now and Version(old).public == Version(new).public
        if not same:
            lines.append(f"{name}: {old} → {new}")
    return lines


def main() -> int:
    installed = {canonicalize_name(each.name): each.version for each in distributions()}
    # Nothing is locked of these.
    unlocked = ("comfy-nai-t5", "pip", *CUDA_PACKAGES)
    installed = {name: version for name, version in installed.items() if not name.startswith(unlocked)}
    changed = drift(locked((ROOT / "constraints.txt").read_text()), installed)
    print(
        f"{len(changed)} releases differ from constraints.txt{':' if changed else ''}", *changed, sep="\n  ", flush=True
    )
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in CONCERNED]
    return int(pytest.main([*files, "-r", "fE", "--tb", "line", *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
