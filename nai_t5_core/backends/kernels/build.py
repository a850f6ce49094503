"""Compiling the kernels for this machine, once, and loading them."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from nai_t5_core.facts.paths import cache_folder

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = ("kernels.h", "tiles.h", "products.cpp", "attention.cpp", "block.cpp", "limit.cpp")
_INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "avx512vnni", "fma")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", *(f"-m{name}" for name in _INSTRUCTIONS))

NO_COMPILER = "there is no C++ compiler to build them with (install g++)"

# Why the kernels could not be built, once that was tried.
_failures: list[str] = []


def missing_for_kernels() -> str | None:
    """What this machine lacks for the kernels, as a sentence; None if nothing is known of. Nothing is built."""
    return _missing_instructions() or next(iter(_failures), None) or _missing_compiler()


def why_not_kernels() -> str | None:
    """Why an automatic choice does not take the kernels: what is missing, or what is better. Nothing is built.

    Where they are better left alone, they can be named all the same.
    """
    return missing_for_kernels() or better_than_kernels()


def prepare_kernels() -> str | None:
    """Builds and loads the kernels, unless that was done; what is missing for it, as a sentence."""
    if lasting := _missing_instructions() or next(iter(_failures), None):
        return lasting
    try:
        library()
    except (RuntimeError, OSError) as error:
        log.warning("the T5 goes without its kernels for AVX512: %s", error)
        _failures.append(str(error))
        return str(error)
    return None


def _missing_instructions() -> str | None:
    if not sys.platform.startswith("linux"):
        return "the kernels are for Linux"
    if not _processor_flags() >= {"avx512_bf16", "avx512_vnni"}:
        return "this processor has no AVX512-BF16, or no AVX512-VNNI"
    return None


def better_than_kernels() -> str | None:
    has_amx = "amx_bf16" in _processor_flags()
    return "this processor has AMX, which oneDNN uses and the kernels do not" if has_amx else None


@lru_cache
def _missing_compiler() -> str | None:
    if built_file().exists() or shutil.which("g++") is not None:
        return None
    return NO_COMPILER


@lru_cache
def _processor_flags() -> frozenset[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def built_file() -> Path:
    """Where the compiled kernels are, or will be."""
    digest = hashlib.sha256("\n".join(_FLAGS).encode())
    for source in _SOURCES:
        digest.update((_FOLDER / source).read_bytes())
    return cache_folder() / f"kernels-{digest.hexdigest()[:16]}.so"


@lru_cache
def library() -> ctypes.CDLL:
    """The compiled kernels; the first process on a machine takes some seconds to compile them.

    Raises:
        RuntimeError: there is no compiler, or it failed.
        OSError: the cache's folder cannot be written.
    """
    built = built_file()
    if not built.exists():
        _build(built)
    # OpenMP's functions are found in the runtime that torch has loaded, so that its number of threads holds here too.
    return ctypes.CDLL(str(built))


def _build(target: Path) -> None:
    if shutil.which("g++") is None:
        raise RuntimeError(NO_COMPILER)
    log.warning("compiling the T5's kernels for AVX512 into %s: once, and it takes some seconds", target)
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
