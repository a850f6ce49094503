"""GPUs that kernels are compiled for where there are none, and what a compiled kernel takes of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Card:
    """What compilers ask of a GPU. ``shared`` is the most bytes of shared memory that one program may have."""

    multiprocessors: int
    threads: int
    shared: int


# By compute capability: A100, RTX 3060, RTX 4090, H100.
CARDS = {
    80: Card(108, 2048, 166912),
    86: Card(28, 1536, 101376),
    89: Card(128, 1536, 101376),
    90: Card(132, 2048, 232448),
}


# Newer ones, that torch's compiler is not tried for here: B200, RTX 5090. Bytes of shared memory of a program.
NEWER_CARDS = {100: 232448, 120: 101376}

# AMD's, and the lanes of a warp: MI200, MI300, RX 7900.
AMD_CARDS = {"gfx90a": (64, 65536), "gfx942": (64, 65536), "gfx1100": (32, 65536)}


def amd_usage(assembly: str) -> dict[str, int]:
    """As :func:`usage`, of a kernel for AMD's; ``STACK`` is the memory of each thread for what does not fit."""

    def most(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", assembly)))

    return {"REG": most("vgpr_count"), "STACK": most("private_segment_fixed_size")}


def usage(cubin: bytes) -> dict[str, int]:
    """Registers (``REG``) and bytes of stack (``STACK``) of a compiled kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {name: re.search(rf"{name}:(\d+)", done.stdout + done.stderr) for name in ("REG", "STACK")}
    return {name: int(match[1]) for name, match in found.items() if match}
