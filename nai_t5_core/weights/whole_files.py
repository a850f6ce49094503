"""Files that appear when they are complete, whoever else writes there, and whatever ends the process."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nobody can delete a file that another process has open
    fcntl = None  # type: ignore[assignment]

_UNFINISHED = re.compile(r"\.[0-9a-f]{8}\.nai-t5\.part$")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` to write to, and renames it in the end; after a fault nothing remains.

    Of several that write one file at once each writes a whole one, and the last stays. What a killed process has left
    in the folder is removed.

    Raises:
        OSError: it cannot be written, or what is there is no file (a folder, a device). ``path`` is as it was.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is there and is no file; give another name to write to")
    try:
        remove_unfinished(path.parent)
        partial, claim = _claimed(path)
        try:
            yield partial
            # Else the new name may be on the disk before the content is.
            os.fsync(claim)
            if fcntl is None:
                os.close(claim)
            partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            with suppress(OSError):
                os.close(claim)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; nothing was kept", str(path)) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a small file, text in UTF-8, as :func:`replacing` does."""
    with replacing(path) as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())


def remove_unfinished(folder: Path) -> None:
    """Removes what :func:`replacing` began in a folder in processes that are no more."""
    for file in folder.glob("*.nai-t5.part"):
        if _UNFINISHED.search(file.name):
            with suppress(OSError):
                _remove_if_abandoned(file)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While this is open, no other process has a folder that asks in the same way; where the system can tell.

    Raises:
        ValueError: another has it.
    """
    if fcntl is None:
        yield
        return
    claim = os.open(folder, os.O_RDONLY)
    try:
        if not _takes(claim, without_locks=True):
            raise ValueError(f"another run is writing in {folder}; wait for its end, or give another folder")
        yield
    finally:
        os.close(claim)


def _claimed(path: Path) -> tuple[Path, int]:
    """A new file beside ``path``, and what says that it is in use until it is closed or the process ends."""
    while True:
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.nai-t5.part")
        claim = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        # Another process may have taken it for abandoned before it was claimed.
        if _takes(claim, without_locks=True) and partial.exists():
            return partial, claim
        os.close(claim)


def _remove_if_abandoned(file: Path) -> None:
    if fcntl is None:
        file.unlink()
        return
    claim = os.open(file, os.O_RDWR)
    try:
        if _takes(claim, without_locks=False):
            file.unlink()
    finally:
        os.close(claim)


def _takes(claim: int, without_locks: bool) -> bool:
    """Whether an open file or folder is in nobody else's use, and is in this one's now.

    ``without_locks`` is the answer where the system or its disk cannot tell.
    """
    if fcntl is None:
        return without_locks
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return without_locks
    return True
