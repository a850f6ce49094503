"""Compiling the kernels for this machine, once, and loading them."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = ("kernels.h", "tiles.h", "products.cpp", "attention.cpp", "block.cpp", "limit.cpp")
_INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "avx512vnni", "fma")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", *(f"-m{name}" for name in _INSTRUCTIONS))


@lru_cache
def missing_for_kernels() -> str | None:
    """What this machine lacks for the kernels, as a sentence; None if nothing. The first call builds them."""
    if not sys.platform.startswith("linux"):
        return "the kernels are for Linux"
    flags = _processor_flags()
    if not flags >= {"avx512_bf16", "avx512_vnni"}:
        return "this processor has no AVX512-BF16, or no AVX512-VNNI"
    if "amx_bf16" in flags:
        return "this processor has AMX, which oneDNN uses and the kernels do not"
    try:
        library()
    except (RuntimeError, OSError) as error:
        log.warning("the T5 goes without its kernels for AVX512: %s", error)
        return str(error)
    return None


def _processor_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _built_file() -> Path:
    digest = hashlib.sha256("\n".join(_FLAGS).encode())
    for source in _SOURCES:
        digest.update((_FOLDER / source).read_bytes())
    # Where the user's programs keep what can be made again (XDG Base Directory Specification).
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "comfy-nai-t5" / f"kernels-{digest.hexdigest()[:16]}.so"


@lru_cache
def library() -> ctypes.CDLL:
    """The compiled kernels; the first process on a machine takes some seconds to compile them.

    Raises:
        RuntimeError: there is no compiler, or it failed.
        OSError: the cache's folder cannot be written.
    """
    built = _built_file()
    if not built.exists():
        _build(built)
    # OpenMP's functions are found in the runtime that torch has loaded, so that its number of threads holds here too.
    return ctypes.CDLL(str(built))


def _build(target: Path) -> None:
    if shutil.which("g++") is None:
        raise RuntimeError("there is no C++ compiler to build them with (install g++)")
    log.info("compiling the kernels for AVX512 into %s, once", target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        sources = [str(_FOLDER / source) for source in _SOURCES if source.endswith(".cpp")]
        done = subprocess.run(["g++", *_FLAGS, *sources, "-o", str(unfinished)], capture_output=True, text=True)
        if done.returncode:
            complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:500])
            raise RuntimeError(f"g++ could not compile the kernels: {complaint}")
        # Another process may have been faster; its file is the same.
        unfinished.replace(target)
