"""How the kernels are compiled, and by what. This needs no torch, so that a wheel can be built without it."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

FOLDER = Path(__file__).parent
# Where a wheel has the kernels that were compiled when it was made.
BROUGHT = FOLDER / "brought"

_FLAGS = ("-O3", "-std=c++17", "-fvisibility=hidden")
_ON_LINUX = ("-fPIC", "-pthread")

_TO_INSTALL = "the package ziglang" if sys.platform == "win32" else "g++, or the package ziglang"
# The first g++ that knows all of the instructions.
_NEW_ENOUGH = _TO_INSTALL.replace("g++", "g++ 11 or newer")
NO_COMPILER = f"there is no C++ compiler to build them with (install {_TO_INSTALL})"
# A compiler that failed where less than this is free most likely failed for that; what it says differs by compiler.
_LITTLE_SPACE = 32 << 20


@dataclass(frozen=True)
class Recipe:
    """What the kernels for an instruction set are compiled from.

    Attributes:
        name: of the instruction set.
        folders: where the sources are that not all sets have, the set's own first.
        flags: what tells a compiler that the processor has it.
    """

    name: str
    folders: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def sources(self) -> list[Path]:
        """All files that the kernels are made of."""
        files = (file for folder in (FOLDER, *self._folders) for file in folder.iterdir())
        return sorted(file for file in files if file.suffix in (".cpp", ".h"))

    @property
    def units(self) -> list[Path]:
        """Those that are compiled, one by one."""
        return [source for source in self.sources if source.suffix == ".cpp"]

    @property
    def arguments(self) -> list[str]:
        """Where a compiler finds the headers, and what it is to be told about the processor."""
        # Of several folders with files of the same names, the first is the set's own.
        return [f"-I{FOLDER}", *(f"-I{folder}" for folder in self._folders[:1]), *self.flags]

    @property
    def _folders(self) -> list[Path]:
        return [FOLDER / folder for folder in self.folders]


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mavx512vnni", "-mfma")
AMX = Recipe("amx", ("amx", "avx512"), (*_AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"))
AVX512 = Recipe("avx512", ("avx512",), _AVX512)
AVX2_VNNI = Recipe("avx2-vnni", ("avx2",), (*_AVX2, "-mavxvnni"))
AVX2 = Recipe("avx2", ("avx2",), _AVX2)
RECIPES = (AMX, AVX512, AVX2_VNNI, AVX2)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        name: as users know it.
        command: what runs it.
        flags: what else it is told. With OpenMP the kernels have its threads, and else their own.
        for_windows: whether the result is for Windows.
        takes: how long it needs, in words.
    """

    name: str
    command: tuple[str, ...]
    flags: tuple[str, ...] = ()
    for_windows: bool = False
    takes: str = "some seconds"

    @property
    def is_there(self) -> bool:
        if self.command[0] == sys.executable:
            return importlib.util.find_spec(self.command[2]) is not None
        return shutil.which(self.command[0]) is not None

    def file_name(self, recipe: Recipe) -> str:
        """Of the compiled kernels; another one for other sources or flags."""
        digest = hashlib.sha256("\n".join((self.name, "sealed", *self._flags, *recipe.flags)).encode())
        for source in recipe.sources:
            digest.update(source.read_bytes())
        return f"kernels-{recipe.name}-{digest.hexdigest()[:16]}{'.dll' if self.for_windows else '.so'}"

    def build(self, recipe: Recipe, target: Path) -> None:
        """Compiles the kernels into a file, which is there when all of it is, and sealed (see :func:`refuse_damaged`).

        Raises:
            RuntimeError: the compiler failed.
            OSError: the folder cannot be written, or has no room.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder, ThreadPoolExecutor() as pool:
            objects = [Path(folder) / f"{unit.stem}.o" for unit in recipe.units]
            compiled = (
                [*self.command, *self._flags, *recipe.arguments, "-c", str(unit), "-o", str(made)]
                for unit, made in zip(recipe.units, objects, strict=True)
            )
            run = partial(self._run, folder=Path(folder))
            list(pool.map(run, compiled))
            unfinished = Path(folder) / target.name
            # OpenMP's runtime is not named: torch has loaded one, and its threads are to be the kernels'.
            linked = [*self.command, *self._for_system, "-shared", *map(str, objects), "-o", str(unfinished)]
            run(linked)
            with unfinished.open("ab") as file:
                file.write(_seal(target.name, unfinished.read_bytes()))
            # Another process may have been faster; its file is the same, and Windows replaces none that is in use.
            try:
                unfinished.replace(target)
            except PermissionError:
                if not target.exists():
                    raise

    @property
    def _flags(self) -> tuple[str, ...]:
        return (*_FLAGS, *self._for_system, *self.flags)

    @property
    def _for_system(self) -> tuple[str, ...]:
        return ("-target", "x86_64-windows-gnu") if self.for_windows else _ON_LINUX

    def _run(self, command: list[str], folder: Path) -> None:
        # In English, whose words are looked for; and all that is written on the way lies in the folder.
        environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(folder), "TMP": str(folder)}
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
        except OSError as error:
            raise RuntimeError(f"{self.name} cannot be started: {error.strerror} (install {_NEW_ENOUGH})") from error
        if done.returncode and shutil.disk_usage(folder).free < _LITTLE_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if done.returncode:
            said = done.stderr.strip() or f"it ended with status {done.returncode}"
            complaint = next((line for line in said.splitlines() if "error" in line), said[:500])
            raise RuntimeError(
                f"{self.name} could not compile the kernels: {complaint.strip()} (install {_NEW_ENOUGH})"
            )


GXX = Compiler("g++", ("g++",), ("-fopenmp",))
_ZIG = (sys.executable, "-m", "ziglang", "c++")
_ZIG_TAKES = "half a minute, or two at its first use"
ZIG = Compiler("ziglang", _ZIG, takes=_ZIG_TAKES)
ZIG_FOR_WINDOWS = Compiler("ziglang", _ZIG, for_windows=True, takes=_ZIG_TAKES)
# Those that make kernels for this system, the best first.
COMPILERS = (ZIG_FOR_WINDOWS,) if sys.platform == "win32" else (GXX, ZIG)


def compilers() -> list[Compiler]:
    """What the kernels can be compiled with here, the best first."""
    return [one for one in COMPILERS if one.is_there]


@lru_cache
def places(recipe: Recipe, cache: Path) -> tuple[Path, ...]:
    """Where compiled kernels for this system may be: those that the package brought first, then those in a cache."""
    return tuple(folder / one.file_name(recipe) for folder in (BROUGHT, cache) for one in COMPILERS)


def there(recipe: Recipe, cache: Path) -> Iterator[Path]:
    """The compiled kernels that are there, the best first."""
    return (place for place in places(recipe, cache) if place.exists())


# ---------------------------------------------------------------------------------------------------------------------
# Files that are whole
# ---------------------------------------------------------------------------------------------------------------------


def refuse_damaged(file: Path) -> None:
    """Raises an OSError where a file is not what a compiler made under this name, such as one that was cut off.

    The system would load the half of a library, and end the process where the rest is read. Loaders ignore what stands
    behind a library, so that the seal is there.
    """
    content = file.read_bytes()
    library, seal = content[:-_SEAL_SIZE], content[-_SEAL_SIZE:]
    if seal != _seal(file.name, library):
        raise OSError(f"{file}: the file is damaged")


def _seal(name: str, library: bytes) -> bytes:
    return hashlib.sha256(name.encode() + library).digest()


_SEAL_SIZE = len(_seal("", b""))
