"""Hashes of contents: of the weights that an encoder is loaded from.

Weights are hashed once: the hash is remembered with the files' paths, sizes, times and inodes, and holds for as long as
these do. It is of the T5's own tensors, so that a tokenizer, a decoder or a diffusion model in the same file, and the
number of files, are not in it. A hash that a file told of itself would survive a change of that file, so none is taken
from a header.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Size, Tensor

from nai_t5_core.backends.quantised.kinds import WEIGHT
from nai_t5_core.facts.nested_text import parse_object
from nai_t5_core.facts.paths import cache_folder
from nai_t5_core.weights.examine import Examination
from nai_t5_core.weights.formats import CheckpointError, tensor_bytes
from nai_t5_core.weights.quantised import Stored
from nai_t5_core.weights.whole_files import write_whole

# Raised when hashes are made in another way.
_VERSION = 2
# Seconds that a file must have been left alone for its hash to be remembered: a file system may give two changes
# within its tick the same time.
_SETTLED = 2.0
# Seconds after which it is told what takes so long.
_TOLD_AFTER = 2.0
_CHUNK = 1 << 24
_OF_THE_ENCODER = ("shared.", "encoder.")


def weights_contents(examination: Examination) -> str:
    """The hash of an encoder's weights as its files hold them, in hexadecimal digits.

    Raises:
        CheckpointError: a file cannot be read.
    """
    files = _files(examination)
    if _is_packed(examination):
        return _once(files, lambda: _hash_files(files))
    return _once(files, lambda: contents_by_reading(examination))


def file_contents(file: Path) -> str:
    """The hash of a whole file, remembered as that of weights is.

    Raises:
        OSError: it cannot be read.
    """
    return _once([file.resolve()], lambda: _hash_files([file]), "the whole file")


def _once(files: list[Path], hash_them: Callable[[], str], of: str = "the encoder") -> str:
    before = _identities(files)
    remembered = _recall(before, of)
    if remembered is not None:
        return remembered
    found = hash_them()
    if _identities(files) == before:
        _remember(before, found, of)
    return found


def contents_by_reading(examination: Examination) -> str:
    """The same without a look at the files, such as of a model in memory; not of blocks."""
    checkpoint, names = examination.checkpoint, _names(examination)
    sizes = [info.dtype.itemsize * Size(info.shape).numel() for info in (checkpoint.tensors[n] for n in names.values())]
    digest = hashlib.sha256()
    for name, stored in _quantised(examination):
        # What the bytes mean is told by notes, names and a header, of which each says it in its own way.
        digest.update(f"{name} {stored.kind!r}\n".encode())
    with _telling(checkpoint.source, sum(sizes)) as advance:
        for (name, full), size in zip(names.items(), sizes, strict=True):
            digest.update(f"{name}\n".encode())
            add_tensor(digest, checkpoint.read(full))
            advance(size)
    return digest.hexdigest()


def tensor_contents(tensor: Tensor) -> str:
    """The hash of a tensor's dtype, shape and numbers."""
    digest = hashlib.sha256()
    add_tensor(digest, tensor)
    return digest.hexdigest()


def add_tensor(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Goes on with a tensor's dtype, shape and numbers."""
    digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor_bytes(tensor))


def _names(examination: Examination) -> dict[str, str]:
    """Names in the file of the encoder's tensors, and of all that stands for quantised weights, by what they are."""
    keymap = examination.keymap
    named = {**keymap.names, **{f"{name} scale": full for name, full in keymap.scales.items()}}
    for name, stored in _quantised(examination):
        named |= {f"{name} {part}": full for part, full in stored.parts.items() if part != WEIGHT}
        named |= {f"{name} beside {number}": full for number, full in enumerate(stored.beside)}
    return {name: full for name, full in sorted(named.items()) if name.startswith(_OF_THE_ENCODER)}


def _quantised(examination: Examination) -> Iterator[tuple[str, Stored]]:
    for name, stored in sorted(examination.quantised.items()):
        if name.startswith(_OF_THE_ENCODER):
            yield name, stored


def _is_packed(examination: Examination) -> bool:
    """Whether weights are in blocks, which would be unpacked to be read."""
    return any(examination.checkpoint.tensors[full].packing for full in _names(examination).values())


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    with _telling(str(files[0]), sum(file.stat().st_size for file in files)) as advance:
        for file in files:
            with file.open("rb") as opened:
                while chunk := opened.read(_CHUNK):
                    digest.update(chunk)
                    advance(len(chunk))
    return digest.hexdigest()


@contextmanager
def _telling(source: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, once it takes long; gives the function to call with the bytes that were hashed."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(f"hashing {Path(source).name}, once, for the cache", total=total)
    started, is_shown = time.monotonic(), False

    def advance(nbytes: int) -> None:
        nonlocal is_shown
        bar.advance(task, nbytes)
        if not is_shown and time.monotonic() - started > _TOLD_AFTER:
            is_shown = True
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()


# ---------------------------------------------------------------------------------------------------------------------
# What is remembered
# ---------------------------------------------------------------------------------------------------------------------


def identities(examination: Examination) -> list[list[str | int]]:
    """What each file of an encoder's weights has to keep for its hash to hold: path, size, times and inode.

    The time of a file's last change of any kind goes up even where a tool sets that of its contents back.
    """
    return _identities(_files(examination))


def refuse_changed(examination: Examination, before: list[list[str | int]]) -> None:
    """Raises a CheckpointError where the files are not those that had these identities."""
    if identities(examination) != before:
        raise CheckpointError(
            f"{examination.checkpoint.source} was changed after the cache had looked at it; make the encoder again"
        )


def _identities(files: list[Path]) -> list[list[str | int]]:
    found = ((file, file.stat()) for file in files)
    return [[str(file), at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino] for file, at in found]


def _files(examination: Examination) -> list[Path]:
    tensors = examination.checkpoint.tensors
    return sorted({tensors[name].file.resolve() for name in _names(examination).values()})


def _place(identities: list[list[str | int]], of: str) -> Path:
    paths = json.dumps([of, *(identity[0] for identity in identities)])
    return cache_folder() / "hashes" / f"{hashlib.sha256(paths.encode()).hexdigest()[:32]}.json"


def _recall(identities: list[list[str | int]], of: str) -> str | None:
    with suppress(OSError, ValueError):
        kept = parse_object(_place(identities, of).read_bytes())
        found = kept.get("sha256")
        if kept.get("version") == _VERSION and kept.get("files") == identities and isinstance(found, str):
            return found if len(found) == 64 else None
    return None


def _remember(identities: list[list[str | int]], found: str, of: str) -> None:
    latest = max(int(moment) for identity in identities for moment in identity[2:4]) / 1e9
    if time.time() - latest < _SETTLED:
        return
    # Without a place to remember it, the weights are hashed again the next time.
    with suppress(OSError):
        place = _place(identities, of)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, json.dumps({"version": _VERSION, "files": identities, "sha256": found}))
