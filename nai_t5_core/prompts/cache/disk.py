"""Embeddings in a folder, a file each, up to so many bytes. Any number of processes may share it."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nai_t5_core.prompts.cache.entry import DamagedEntryError, Entry, Form, from_bytes, to_bytes
from nai_t5_core.prompts.cache.key import Key
from nai_t5_core.prompts.cache.memory import Embedding
from nai_t5_core.prompts.cache.process_lock import ProcessLock
from nai_t5_core.weights.whole_files import remove_unfinished, write_whole

log = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_FOLDER = re.compile(r"[0-9a-f]{2}")
# What is left when something has to go, so that not every new entry has to look at all others.
_LEFT = 0.9


@dataclass(frozen=True)
class Kept:
    """A file of the folder: its bytes, and when it was last read or written, in seconds."""

    path: Path
    nbytes: int
    used: float


class DiskStore:
    """Entries at ``<first 2 digits>/<digest of the key>.safetensors``; the least recently read go out.

    An entry appears when it is whole, under another name until then. What cannot be read or written costs the entry and
    nothing else, and is told once. Files of other names are left alone.

    Args:
        folder: made when the first entry is written.
        limit: bytes of all entries together.
        form: how the numbers are kept. Entries of another form are only taken if they are as computed.
    """

    def __init__(self, folder: Path, limit: int, form: Form = "computed") -> None:
        self.folder, self.limit, self.form = folder, limit, form
        self._nbytes: int | None = None
        self._told: set[str] = set()
        self._lock = ProcessLock()

    def place(self, key: Key) -> Path:
        """The file of a key."""
        return self.folder / key.digest[:2] / f"{key.digest}.safetensors"

    def get(self, key: Key, least_rows: int = 1) -> Embedding | None:
        """What is kept under a key, if it is there, whole, and has as many rows."""
        path = self.place(key)
        try:
            entry = from_bytes(path.read_bytes())
            if entry.key != key:
                raise DamagedEntryError("it is of another embedding")
        except FileNotFoundError:
            return None
        except DamagedEntryError as error:
            self._tell(f"an entry of the embedding cache is left out and will be replaced: {path}: {error}")
            return None
        except OSError as error:
            self._tell(_unusable(self.folder, error))
            return None
        if len(entry.rows) < least_rows or not self._allows(entry):
            return None
        with suppress(OSError):  # of another user, or gone meanwhile: it was read all the same
            os.utime(path)
        return Embedding(entry.rows, entry.extras)

    def put(self, key: Key, embedding: Embedding) -> bool:
        """Writes an entry; whether it is on the disk for certain."""
        content = to_bytes(key, embedding.rows, self.form, embedding.extras)
        if len(content) > self.limit:
            return False
        path = self.place(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(len(content))
            write_whole(path, content)
        except OSError as error:
            self._tell(_unusable(self.folder, error))
            return False
        return True

    def kept(self) -> list[Kept]:
        """All entries, the least recently used first."""
        return sorted(self._entries(), key=lambda kept: kept.used)

    def faults(self) -> dict[Path, str]:
        """What is wrong with entries, by file; every one is read."""
        faults = {}
        for kept in self.kept():
            try:
                entry = from_bytes(kept.path.read_bytes())
                if self.place(entry.key) != kept.path:
                    faults[kept.path] = "it is of another embedding"
            except FileNotFoundError:
                continue
            except (DamagedEntryError, OSError) as error:
                faults[kept.path] = str(error)
        return faults

    def clear(self) -> list[Kept]:
        """Removes all entries, and what killed processes have left; returns them.

        Raises:
            OSError: one cannot be removed.
        """
        removed = self.kept()
        for kept in removed:
            kept.path.unlink(missing_ok=True)
        for folder in self._folders():
            remove_unfinished(folder)
            with suppress(OSError):  # something else lies in it
                folder.rmdir()
        self._nbytes = None
        return removed

    def _allows(self, entry: Entry) -> bool:
        return entry.form in ("computed", self.form)

    def _folders(self) -> Iterator[Path]:
        with suppress(OSError):
            for folder in self.folder.iterdir():
                if _FOLDER.fullmatch(folder.name) and folder.is_dir():
                    yield folder

    def _entries(self) -> Iterator[Kept]:
        for folder in self._folders():
            with suppress(OSError):
                for path in folder.iterdir():
                    with suppress(OSError):  # gone meanwhile
                        if _NAME.fullmatch(path.name):
                            found = path.stat()
                            yield Kept(path, found.st_size, found.st_mtime)

    def _make_room(self, nbytes: int) -> None:
        """Removes the least recently used entries where one more would be beyond the limit."""
        with self._lock:
            if self._nbytes is None:
                self._nbytes = sum(kept.nbytes for kept in self._entries())
            self._nbytes += nbytes
            if self._nbytes <= self.limit:
                return
            # Others may have added and removed some.
            entries = self.kept()
            self._nbytes = nbytes + sum(kept.nbytes for kept in entries)
            if self._nbytes <= self.limit:
                return
            for kept in entries:
                if self._nbytes <= max(self.limit * _LEFT, nbytes):
                    break
                with suppress(FileNotFoundError):
                    kept.path.unlink()
                self._nbytes -= kept.nbytes

    def _tell(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            log.warning("%s", sentence)


def _unusable(folder: Path, error: OSError) -> str:
    """Why a folder cannot be used, and what to do."""
    reasons = {
        errno.ENOSPC: "its disk is full; make room",
        errno.ENOTDIR: "a file is where it needs a folder; give a folder",
        errno.EEXIST: "a file is where it needs a folder; give a folder",
        errno.EACCES: "it belongs to another user, or is read-only; give another folder",
        errno.EROFS: "it is read-only; give another folder",
    }
    reason = reasons.get(error.errno or 0, f"{error.strerror or error}; give another folder")
    return f"the embedding cache in {folder} is not usable: {reason}. Prompts are encoded all the same"
