"""What an export is given of a set, and what every format says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

# Endings of files that an id may name; what else follows a dot belongs to the name.
_MEDIA = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".avif", ".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".txt"}


@dataclass(frozen=True)
class ClipEmbedding:
    """What a format needs of CLIP.

    Attributes:
        pooled: [dim], float32.
        states: [77, dim], float32; None for families that read the pooled embedding alone.
        masks: int64 [77] of each tokenizer, ones at the text.
    """

    pooled: Tensor
    states: Tensor | None
    masks: tuple[Tensor, ...]


@dataclass(frozen=True)
class Sample:
    """A sample of a set.

    Attributes:
        states: [rows, d_model], bfloat16.
        text_rows: how many of the rows a mask counts as text.
        length: that the family's prompts are padded to.
    """

    id: str
    caption: str
    family: str
    states: Tensor
    text_rows: int
    length: int
    clip: ClipEmbedding | None = None

    @property
    def text(self) -> Tensor:
        """The rows of the text, [text rows, d_model]."""
        return self.states[: self.text_rows].contiguous()

    def padded(self) -> Tensor:
        """[length, d_model], zeros where the set has no rows."""
        out = self.states.new_zeros(self.length, self.states.shape[1])
        out[: len(self.states)] = self.states
        return out

    def mask(self) -> Tensor:
        """[length] bool."""
        return torch.arange(self.length) < self.text_rows

    @property
    def with_clip(self) -> ClipEmbedding:
        assert self.clip is not None, "an export without CLIP's embeddings is refused before it begins"
        return self.clip


@dataclass(frozen=True)
class Format:
    """A trainer's format.

    Attributes:
        name: the choice of ``--to``.
        families: those it exists for, and the padding policies of a set that gives what the trainer's own encoding
            gives.
        write: writes samples to a folder.
        place: the file of a sample in the folder, by id and caption; None where it is not one file for a sample.
        with_clip: those of the families that need CLIP as well.
        shares_files: whether samples of one caption have one file.
    """

    name: str
    families: Mapping[str, tuple[str, ...]]
    write: Callable[[Iterable[Sample], Path], None]
    place: Callable[[str, str], str] | None = None
    with_clip: frozenset[str] = field(default_factory=frozenset)
    shares_files: bool = False


def stem_of(sample_id: str) -> str:
    """An id without the ending of a media file; folders in it stay."""
    path = PurePosixPath(sample_id)
    return str(path.with_suffix("")) if path.suffix.lower() in _MEDIA else sample_id


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to that is renamed in the end, so that no reader finds half a file.

    Not synchronised for each of a million small files: an export can be made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
