"""Which kernels this machine can have; compiling them, once for each instruction set that is used, and loading them."""

from __future__ import annotations

import ctypes
import errno
import logging
import platform
import sys
from functools import cache, lru_cache
from pathlib import Path

import torch

from nai_t5_core.backends.kernels.compilers import (
    NO_COMPILER,
    Compiler,
    compilers,
    places,
    refuse_damaged,
    there,
)
from nai_t5_core.backends.kernels.sets import AVX2, AVX512, CHOSEN, SETS, InstructionSet
from nai_t5_core.facts.paths import cache_folder

log = logging.getLogger(__name__)

# Why the kernels for a set, by its name, could not be built, once that was tried.
_failures: dict[str, str] = {}

# ---------------------------------------------------------------------------------------------------------------------
# What there is
# ---------------------------------------------------------------------------------------------------------------------


def missing_for(instructions: InstructionSet) -> str | None:
    """What this machine lacks for the kernels of a set, as a sentence; None if nothing known. Nothing is built."""
    return _lasting_obstacle(instructions) or _missing_compiler(instructions)


def best_set() -> InstructionSet | None:
    """The best set that nothing is missing for, as far as is known; None where there is none. Nothing is built."""
    return next((instructions for instructions in CHOSEN if missing_for(instructions) is None), None)


def set_to_use(named: InstructionSet | None = None) -> InstructionSet | None:
    """What computes, as far as is known before it is built; None: nothing can, or something is better.

    Args:
        named: the set that was asked for; None: the best that this processor has, unless oneDNN has something better.
    """
    if named is not None:
        return named if missing_for(named) is None else None
    return None if better_than_kernels() else best_set()


def missing_for_kernels() -> str | None:
    """What this machine lacks for the kernels of any set, as a sentence; None if nothing is known of."""
    return None if best_set() is not None else missing_for(nearest_set())


def nearest_set() -> InstructionSet:
    """The best set that the processor has, whether or not it can be built; or the one that asks least of it."""
    return next((instructions for instructions in CHOSEN if _missing_instructions(instructions) is None), CHOSEN[-1])


def why_not_kernels() -> str | None:
    """Why an automatic choice does not take the kernels: what is missing, or what is better. Nothing is built.

    Where they are better left alone, they can be named all the same.
    """
    return missing_for_kernels() or better_than_kernels()


def better_than_kernels() -> str | None:
    """What oneDNN uses on this processor and the kernels do not, as a sentence; None if nothing."""
    flags = _processor_flags()
    if "amx_bf16" in flags:
        return "this processor has AMX, which oneDNN uses, and the kernels only where it is named"
    if "avx512f" in flags and not flags >= AVX512.needs:
        return (
            "this processor has AVX512, but not its BF16 and VNNI, without which oneDNN uses it and the kernels do not"
        )
    return None


def _lasting_obstacle(instructions: InstructionSet) -> str | None:
    return _missing_instructions(instructions) or _failures.get(instructions.name)


def _missing_instructions(instructions: InstructionSet) -> str | None:
    if sys.platform != "win32" and not sys.platform.startswith("linux"):
        return "the kernels are for Linux and Windows"
    if (machine := platform.machine()) not in ("x86_64", "AMD64"):
        return f"the kernels are for x86-64, and this processor is {machine}"
    return None if _processor_flags() >= instructions.needs else instructions.lacking


@lru_cache
def _missing_compiler(instructions: InstructionSet) -> str | None:
    return None if built_file(instructions).exists() or compilers() else NO_COMPILER


@lru_cache
def _processor_flags() -> frozenset[str]:
    """What the processor has, by the names that Linux has for it; on Windows what torch knows of."""
    if sys.platform == "win32":
        known = {
            "_is_avx2_supported": AVX2.needs,
            "_is_avx512_supported": {"avx512f"},
            "_is_avx512_bf16_supported": {"avx512_bf16"},
            "_is_vnni_supported": {"avx512_vnni"},
            "_is_amx_tile_supported": {"amx_tile", "amx_bf16", "amx_int8"},
        }
        return frozenset().union(*(flags for ask, flags in known.items() if getattr(torch.cpu, ask, bool)()))
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


def prepare_kernels(instructions: InstructionSet | None = None) -> str | None:
    """Builds and loads the kernels of a set, unless that was done; what is missing for it, as a sentence.

    Without a set it is the best that can be built, which :func:`best_set` gives from then on.
    """
    if instructions is not None:
        return _prepare(instructions)
    while (best := best_set()) is not None:
        if _prepare(best) is None:
            return None
    missing = missing_for_kernels()
    if missing == NO_COMPILER:
        tell_that_no_compiler_is_there()
    return missing


@cache
def tell_that_no_compiler_is_there() -> None:
    """Says once what a processor that has the instructions lacks; for where an automatic choice computes without."""
    log.warning("the T5 goes without its kernels for %s: %s", nearest_set().title, NO_COMPILER)


def _prepare(instructions: InstructionSet) -> str | None:
    if lasting := _lasting_obstacle(instructions):
        return lasting
    try:
        library(instructions)
    except _FolderError as error:
        # It is in the way of all that is not built yet, which is told once.
        log.warning("the T5 goes without its kernels: %s", error)
        stopped = [each for each in SETS if each is instructions or not built_file(each).exists()]
        _failures.update({each.name: str(error) for each in stopped})
        return str(error)
    except (RuntimeError, OSError) as error:
        log.warning("the T5 goes without its kernels for %s: %s", instructions.title, error)
        _failures[instructions.name] = str(error)
        return str(error)
    return None


class _FolderError(RuntimeError):
    """What is compiled can be written nowhere, or not be loaded from where it is."""


def built_file(instructions: InstructionSet) -> Path:
    """Where the compiled kernels of a set are, or will be."""
    cache = cache_folder()
    if (found := next(there(instructions.recipe, cache), None)) is not None:
        return found
    by = next(iter(compilers()), None)
    return places(instructions.recipe, cache)[-1] if by is None else cache / by.file_name(instructions.recipe)


@lru_cache
def library(instructions: InstructionSet) -> ctypes.CDLL:
    """The compiled kernels of a set; the first process on a machine takes some seconds to compile them.

    What is there and does not load, such as a wheel's for a newer system, is passed over, as is a compiler that fails.

    Raises:
        RuntimeError: there is no compiler, or all failed; the cache's folder cannot be written or loaded from;
            or the system refuses the instructions to this process.
    """
    failure = RuntimeError(NO_COMPILER)
    for found in there(instructions.recipe, cache_folder()):
        try:
            return _load(instructions, found)
        except OSError as error:
            reason = _reason(error, found)
            log.warning("the T5's kernels in %s do not load: %s", found, reason)
            failure = RuntimeError(f"those in {found} do not load ({reason}), and {NO_COMPILER}")
    for by in compilers():
        try:
            return _load_built(instructions, by)
        except RuntimeError as error:
            failure = error
    raise failure


def _load_built(instructions: InstructionSet, by: Compiler) -> ctypes.CDLL:
    built = _built_by(by, instructions)
    try:
        return _load(instructions, built)
    except OSError as error:
        reason = _reason(error, built)
        if "undefined symbol" in reason:
            raise RuntimeError(
                f"what {by.name} compiled does not load, since torch brings no OpenMP that it knows ({reason}); "
                "install the package ziglang, whose kernels need none"
            ) from error
        raise _FolderError(
            f"libraries cannot be loaded from the folder {built.parent} ({reason}): set XDG_CACHE_HOME to a folder "
            "that permits it"
        ) from error


def _reason(error: OSError, file: Path) -> str:
    """What an error says of a file, without its path."""
    return str(error).removeprefix(f"{file}: ")


def _load(instructions: InstructionSet, built: Path) -> ctypes.CDLL:
    refuse_damaged(built)
    # OpenMP's functions are found in the runtime that torch has loaded, so that its number of threads holds here too.
    loaded = ctypes.CDLL(str(built))
    if not loaded.t5_is_permitted():
        title = instructions.title
        raise RuntimeError(
            f"the system does not let this process use {title}: it needs Linux 5.16 or newer, "
            "and a container that permits arch_prctl"
        )
    return loaded


def _built_by(by: Compiler, instructions: InstructionSet) -> Path:
    target = cache_folder() / by.file_name(instructions.recipe)
    title = instructions.title
    log.warning("compiling the T5's kernels for %s into %s: once, and it takes %s", title, target, by.takes)
    try:
        by.build(instructions.recipe, target)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space, or set XDG_CACHE_HOME to a folder with room"
        if not is_full:
            remedy = "make it writable, or set XDG_CACHE_HOME to a folder that is"
        raise _FolderError(
            f"the folder {target.parent} cannot be written ({error.strerror or error}): {remedy}"
        ) from error
    return target
