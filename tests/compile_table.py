"""Compiles our kernels, and what torch makes of our encoder, for GPUs that are not here, and prints what they take.

python tests/compile_table.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cards import AMD_CARDS, CARDS, NEWER_CARDS

SCRIPTS = ("compile_for_gpus.py", "compile_bytes_for_gpus.py", "compile_graphs_for_gpus.py")


def compiled(script: str, capability: int | str) -> list[dict[str, Any]]:
    """What each kernel takes, in a process for itself, since a compiler believes in one card only.

    Raises:
        subprocess.CalledProcessError: something does not compile.
    """
    here = Path(__file__).parent
    command = [sys.executable, str(here / script), str(capability)]
    done = subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def row_of(usage: dict[str, Any]) -> str:
    """Under which heading a kernel stands in the table."""
    if "graph" not in usage:
        return f"ours: {usage['kernel']}"
    if usage["graph"].startswith("flex"):
        return str(usage["graph"])
    return usage["graph"] + (", its attention" if "flex_attention" in usage["kernel"] else ", its other kernels")


def table() -> str:
    """As Markdown: the largest number of registers, bytes of stack, and bytes of shared memory of each row."""
    rows: dict[str, dict[int | str, list[dict[str, Any]]]] = {}
    targets = (*CARDS, *NEWER_CARDS, *AMD_CARDS)
    for capability in targets:
        for script in _scripts_for(capability):
            for usage in compiled(script, capability):
                rows.setdefault(row_of(usage), {}).setdefault(capability, []).append(usage)
    names = [*(f"sm_{capability}" for capability in (*CARDS, *NEWER_CARDS)), *AMD_CARDS]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for name, by_card in rows.items():
        cells = (_cell(by_card.get(capability, [])) for capability in targets)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    shared_of_nvidia = (*(card.shared for card in CARDS.values()), *NEWER_CARDS.values())
    limits = [f"255, 0, {shared:,}" for shared in shared_of_nvidia]
    limits += [f"{512 if lanes == 64 else 256}, 0, {shared:,}" for lanes, shared in AMD_CARDS.values()]
    return "\n".join([*lines, "| allowed | " + " | ".join(limits) + " |"])


def _scripts_for(capability: int | str) -> tuple[str, ...]:
    """All of them, for cards that each script knows; the kernels for 8 bits are for NVIDIA's alone."""
    if capability in CARDS:
        return SCRIPTS
    return SCRIPTS[:2] if capability in NEWER_CARDS else SCRIPTS[:1]


def _cell(usages: list[dict[str, Any]]) -> str:
    return (
        ", ".join(f"{max(usage[name] for usage in usages):,}" for name in ("REG", "STACK", "shared")) if usages else ""
    )


if __name__ == "__main__":
    print(table())
