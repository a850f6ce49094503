"""What planning knows of samples and prompts, in a file, so that a set may be larger than memory.

It lives as long as planning does. A plan that was cut off begins again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from nai_t5_core.datasets.tokens import Prompt

# Both tables lie in the order that they are read in: samples by id, prompts by length and then by key, which is an
# order that does not depend on that of the captions.
_TABLES = """
CREATE TABLE samples (id TEXT PRIMARY KEY, key BLOB NOT NULL, caption TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE prompts (
    rows INTEGER, key BLOB, tokens INTEGER, is_cut INTEGER, ids BLOB, PRIMARY KEY (rows, key)
) WITHOUT ROWID;
"""
# Safe against nothing, since a plan that was cut off is thrown away; 64 MB of cache.
_PRAGMAS = "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-65536; PRAGMA locking_mode=EXCLUSIVE;"

Sample = tuple[str, bytes, str]


class OtherCaptionError(ValueError):
    """An id is given to two captions."""


class Ledger:
    """Samples (id, key, caption) and prompts, each once.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        file.unlink(missing_ok=True)
        with self._telling():
            self._db = sqlite3.connect(file, isolation_level=None)
            self._db.executescript(_PRAGMAS + _TABLES)
            self._db.execute("BEGIN")

    def close(self) -> None:
        self._db.close()
        with suppress(OSError):
            self._file.unlink(missing_ok=True)

    def add_known(self, keys: Sequence[tuple[int, bytes]]) -> None:
        """Prompts, as (rows, key), that have a shard already."""
        self._many("INSERT OR IGNORE INTO prompts VALUES (?, ?, NULL, NULL, NULL)", keys)

    def add_known_samples(self, samples: Sequence[Sample]) -> None:
        """Samples of an earlier plan."""
        self._many("INSERT INTO samples VALUES (?, ?, ?)", samples)

    def add(self, samples: Sequence[Sample], prompts: Sequence[tuple[int, Prompt]]) -> None:
        """Samples, and their prompts with the rows that each has. What is there already is left as it is.

        Raises:
            OtherCaptionError: an id was there with another prompt.
        """
        self._many(
            "INSERT OR IGNORE INTO prompts VALUES (?, ?, ?, ?, ?)",
            [(rows, prompt.key, prompt.tokens, prompt.is_cut, prompt.ids) for rows, prompt in prompts],
        )
        before = self._db.total_changes
        self._many("INSERT OR IGNORE INTO samples VALUES (?, ?, ?)", samples)
        if self._db.total_changes - before < len(samples):
            self._refuse_other_captions(samples)

    def _refuse_other_captions(self, samples: Sequence[Sample]) -> None:
        for name, key, caption in samples:
            there, other = self._db.execute("SELECT key, caption FROM samples WHERE id = ?", (name,)).fetchone()
            if there != key:
                raise OtherCaptionError(
                    f"the id {name!r} is given to two captions: {_begin(other)} and {_begin(caption)}; nothing was "
                    "changed"
                )

    @property
    def sample_count(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM samples").fetchone()[0])

    def samples(self) -> Iterator[Sample]:
        """All samples, by id."""
        return iter(self._db.execute("SELECT id, key, caption FROM samples ORDER BY id"))

    def new_prompts(self) -> Iterator[tuple[int, Prompt]]:
        """The prompts without a shard, with the rows of each; the shortest first."""
        chosen = "SELECT rows, key, ids, tokens, is_cut FROM prompts WHERE ids IS NOT NULL ORDER BY rows, key"
        for rows, key, ids, tokens, is_cut in self._db.execute(chosen):
            yield rows, Prompt(key, ids, tokens, bool(is_cut))

    def _many(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        with self._telling():
            self._db.executemany(statement, rows)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(f"{self._file} cannot be written: {error}; nothing was changed") from error


def _begin(caption: str) -> str:
    return repr(caption if len(caption) <= 60 else caption[:57] + "...")
