"""What the machine is, and which backends can run on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from nai_t5_core.backends.choices import missing_for_int8
from nai_t5_core.backends.cuda.card import card_of
from nai_t5_core.backends.cuda.card_choice import choice_for
from nai_t5_core.backends.kernels.build import missing_for_kernels
from nai_t5_core.bench.doctor.model import weight_bytes
from nai_t5_core.bench.doctor.patient import Finding, Patient
from nai_t5_core.facts.config import named_config
from nai_t5_core.model.attention_choice import missing_for_flex

# The processor flags that decide which backend computes a T5.
_INSTRUCTION_SETS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "i8mm",
)
# What a machine may lack, as the report names it.
CPU_KERNELS, INT8 = "kernels of ours for the CPU", "weights in int8"
_LARGEST = "t5-v1_1-xxl"
_PACKAGES = ("torch", "triton", "transformers", "diffusers", "nai-t5", "numpy")


def describe(patient: Patient) -> Finding:
    """Processor, card, memory, versions; and which backends cannot run here, with the reason."""
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "python": platform.python_version(),
        "processor": _processor(),
        "instruction_sets": _instruction_sets(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "free_bytes": _free_bytes(),
        "device": str(patient.device),
        "card": _card(patient.device),
        "versions": _versions(),
        "compilers": [name for name in ("g++", "clang++", "nvcc") if shutil.which(name)],
        "dtype": str(patient.dtype).removeprefix("torch."),
        "model": _model(patient),
        "missing": {name: reason for name, reason in _obstacles(patient).items() if reason},
    }


def _model(patient: Patient) -> dict[str, Any]:
    """The model that is to find room here: the one that was named, or the largest that diffusion models use."""
    named = patient.settings.model is not None
    config = patient.config if named else named_config(_LARGEST)
    in_16_bits, in_8_bits = weight_bytes(config)
    return {
        "name": patient.model.name if named else "A T5-XXL",
        "bytes_in_16_bits": in_16_bits,
        "bytes_in_8_bits": in_8_bits,
        "quantised_bytes": patient.model.quantised_bytes if named else None,
    }


def try_device(patient: Patient) -> Finding:
    """Takes memory of the device and multiplies there; raises what torch raises."""
    ones = torch.ones(64, 64, device=patient.device)
    found = float((ones @ ones).sum())
    return {"wrong": [] if found == 64**3 else [f"a sum of {64**3} ones is {found:g}"]}


def _processor() -> str:
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return done.stdout.strip()
    return platform.processor() or platform.machine()


def _instruction_sets() -> list[str]:
    if not Path("/proc/cpuinfo").is_file():
        return [torch.backends.cpu.get_cpu_capability()]
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = {
        flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()
    }
    return [name for name in _INSTRUCTION_SETS if name in flags]


def _memory_bytes() -> int | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_bytes() -> int | None:
    """The memory that programs can still be given, within what a container may have; all of it where none tells."""
    told = (_available_bytes(Path("/proc/meminfo")), _bytes_below_the_limit(Path("/sys/fs/cgroup")))
    return min((free for free in told if free is not None), default=_memory_bytes())


def _available_bytes(meminfo: Path) -> int | None:
    """As the system tells; None where it does not."""
    kibibytes = _number_behind("MemAvailable:", meminfo)
    return None if kibibytes is None else kibibytes << 10


def _bytes_below_the_limit(group: Path) -> int | None:
    """What a container has left; None where it has no limit.

    Files that were read lately count as used there, and give way to programs.
    """
    limit, used = group / "memory.max", group / "memory.current"
    if not limit.is_file() or not (most := limit.read_text().strip()).isdigit():
        return None
    return int(most) - int(used.read_text()) + (_number_behind("inactive_file", group / "memory.stat") or 0)


def _number_behind(name: str, file: Path) -> int | None:
    """The number in the line that begins with a name; None where there is no such line or file."""
    lines = (line.split() for line in file.read_text().splitlines()) if file.is_file() else ()
    return next((int(words[1]) for words in lines if words[:1] == [name]), None)


def _card(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    known = card_of(device)
    assert known is not None
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "architecture": known.architecture,
        "choice": choice_for(known).origin,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": total,
        "free_bytes": free,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": _driver(),
    }


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _obstacles(patient: Patient) -> dict[str, str | None]:
    """Why each backend cannot run here, by name; None where it can."""
    device, cuda = patient.device, None
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        cuda = "this torch is built without it" if built is None else f"no card, or a driver too old for CUDA {built}"
    return {
        "CUDA": cuda,
        CPU_KERNELS: missing_for_kernels(),
        INT8: missing_for_int8(device, patient.dtype),
        "flex attention, nor compiled encoders": missing_for_flex(device),
    }
