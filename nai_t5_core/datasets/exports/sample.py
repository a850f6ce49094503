"""What an export is given of a set, and what every format says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from nai_t5_core.facts.families import Family
from nai_t5_core.facts.families.record import Trainers

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
        tokens: of the text with its end token; fewer than ``text_rows`` where a pad counts as text.
        length: that the family's prompts are padded to.
    """

    id: str
    caption: str
    family: Family
    states: Tensor
    text_rows: int
    tokens: int
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
    def trainers(self) -> Trainers:
        assert self.family.trainers is not None, "an export for other families is refused before it begins"
        return self.family.trainers

    @property
    def with_clip(self) -> ClipEmbedding:
        assert self.clip is not None, "an export without CLIP's embeddings is refused before it begins"
        return self.clip


# The file of a sample in the folder that is written to, by id, caption, and what the trainer calls the family.
Place = Callable[[str, str, str], str]


@dataclass(frozen=True)
class Format:
    """A trainer's format.

    Attributes:
        name: the choice of ``--to``, by which the families' records name it.
        write: writes samples to a folder.
        place: the files' names; None where there is not a file for each sample.
        shares_files: whether samples of one caption have one file.
        has_one_length: whether it is padded to one length for each family, which is the family's own: a diffusion
            model reads the padding. Where files are not padded, or the trainer's configuration has the length, sets of
            every length are written.
    """

    name: str
    write: Callable[[Iterable[Sample], Path], None]
    place: Place | None = None
    shares_files: bool = False
    has_one_length: bool = False


def stem_of(sample_id: str) -> str:
    """An id without the ending of a media file; folders in it stay."""
    path = PurePosixPath(sample_id)
    return str(path.with_suffix("")) if path.suffix.lower() in _MEDIA else sample_id


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to that is renamed in the end, so that no reader finds half a file.

    Not synchronised for each of a million small files: an export can be made again.

    Raises:
        OSError: it cannot be written, or the disk is full.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; complete files stay", str(path)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
