"""Where the parts of a set lie in its folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nai_t5_core.weights.whole_files import replacing

_SAMPLES = re.compile(r"samples-\d{5,}\.parquet")
_SHARD = re.compile(r"(\d{5,})\.safetensors")


@dataclass(frozen=True)
class SetFolder:
    """The folder of a set: ``plan.json``, ``samples-NNNNN.parquet``, ``index.parquet``, ``plan/`` and ``shards/``."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    def samples(self, edition: int) -> Path:
        """The samples of an edition of the plan."""
        return self.path / f"samples-{edition:05d}.parquet"

    def all_samples(self) -> list[Path]:
        """Those of every edition, one that was not published included."""
        return sorted(path for path in self.path.glob("samples-*.parquet") if _SAMPLES.fullmatch(path.name))

    @property
    def index(self) -> Path:
        return self.path / "index.parquet"

    @property
    def ledger(self) -> Path:
        return self.path / "planning.sqlite"

    @property
    def prompts_folder(self) -> Path:
        return self.path / "plan"

    @property
    def shards_folder(self) -> Path:
        return self.path / "shards"

    def prompts(self, number: int) -> Path:
        """The prompts of a shard, before they are encoded."""
        return self.prompts_folder / f"{number:05d}.safetensors"

    def shard(self, number: int) -> Path:
        return self.shards_folder / f"{number:05d}.safetensors"

    def damaged(self, number: int) -> Path:
        """What verify has set aside."""
        return self.shards_folder / f"{number:05d}.safetensors.damaged"

    def numbers_in(self, folder: Path) -> Iterator[int]:
        """The numbers of the shards' files that are in one of the folders."""
        if folder.is_dir():
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                if found := _SHARD.fullmatch(entry.name):
                    yield int(found[1])


@contextmanager
def lasting(path: Path) -> Iterator[Path]:
    """As :func:`replacing`, and the name is on the disk as well when this ends."""
    with replacing(path) as partial:
        yield partial
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    # Windows, and some network disks, cannot.
    with suppress(OSError):
        claim = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(claim)
        finally:
            os.close(claim)
