"""A set in the files that a trainer reads in place of encoding captions itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import torch

from nai_t5_core.datasets.exports.clip import ClipEncoder
from nai_t5_core.datasets.exports.fastvideo import FASTVIDEO
from nai_t5_core.datasets.exports.files import (
    LTX,
    MUSUBI_WAN,
    PIXART,
    SD_SCRIPTS_FLUX,
    SD_SCRIPTS_SD3,
    SIMPLETUNER,
    ai_toolkit,
)
from nai_t5_core.datasets.exports.sample import Format, Sample
from nai_t5_core.datasets.reading import EmbeddingDataset
from nai_t5_core.datasets.samples import known_samples
from nai_t5_core.facts.families import FAMILIES, Family
from nai_t5_core.facts.nested_text import shown

FORMATS = {
    known.name: known
    for known in (MUSUBI_WAN, FASTVIDEO, PIXART, SIMPLETUNER, LTX, ai_toolkit(), SD_SCRIPTS_FLUX, SD_SCRIPTS_SD3)
}


def export(
    folder: str | Path,
    to: str,
    out: Path,
    clip: str | None = None,
    space: str | None = None,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes a set in a trainer's format; gives the number of samples.

    Args:
        folder: the set.
        to: one of :data:`FORMATS`.
        out: the folder to write to; files of the same names are replaced.
        clip: a diffusers pipeline with the CLIP text encoders, for formats that hold their embeddings.
        space: for ai-toolkit, the architecture that its configuration names.
        told: is called with samples done and all samples.

    Raises:
        ValueError: the set is not complete, or not of a family, padding and length that the format is for; two samples
            would get one file; an id is no path within a folder; CLIP is needed and not given.
        OSError: a file cannot be written.
    """
    if to not in FORMATS:
        raise ValueError(f"unknown format {shown(to)}; allowed: {', '.join(FORMATS)}")
    if space is not None and to != "ai-toolkit":
        raise ValueError(f"{to} has no architecture in its file names; leave --arch out")
    chosen = ai_toolkit(space) if space is not None else FORMATS[to]
    dataset = EmbeddingDataset(folder)
    family = _family_for(dataset, chosen)
    trainers = family.trainers
    assert trainers is not None
    _refuse_clip(chosen, family.name, trainers.clips, clip)
    _refuse_unfinished(dataset)
    _refuse_names(dataset, chosen, trainers.names[chosen.name])
    encoder = ClipEncoder(clip, both=trainers.clips > 1) if clip is not None else None
    chosen.write(_samples(dataset, family, encoder, told), out)
    return len(dataset)


def _samples(
    dataset: EmbeddingDataset, family: Family, clip: ClipEncoder | None, told: Callable[[int, int], None]
) -> Iterator[Sample]:
    length = dataset.plan.recipe.feeding.max_length
    done = 0
    for batch in known_samples(dataset.folder.samples(dataset.plan.edition)):
        for name, _, caption in batch:
            states, text_rows = dataset[name]
            tokens = dataset.token_count(name) if family.extra_pad else text_rows
            clips = clip(caption) if clip else None
            yield Sample(name, caption, family, states, text_rows, tokens, length, clips)
            done += 1
            told(done, len(dataset))


def _family_for(dataset: EmbeddingDataset, chosen: Format) -> Family:
    """The set's family, if the format is for it, and if the set has the rows that the trainer's own encoding gives."""
    feeding = dataset.plan.recipe.feeding
    known = [row for row in FAMILIES if row.trainers is not None and chosen.name in row.trainers.names]
    family = next((row for row in known if row.name == feeding.family), None)
    if family is None:
        names = ", ".join(row.name for row in known)
        raise ValueError(f"{chosen.name} is for {names}, and this set is of {feeding.family or 'no family'}")
    # Rows of pads are zeros, or tokens like others.
    allowed = ("skip", "trim") if family.padding == "skip" else (family.padding,)
    if feeding.padding not in allowed:
        raise ValueError(
            f"{chosen.name} reads sets of {family.name} with padding {' or '.join(allowed)}, and this one has "
            f"{feeding.padding}"
        )
    own = family.call_length or family.max_length
    if chosen.has_one_length and feeding.max_length != own:
        raise ValueError(
            f"{chosen.name} pads captions of {family.name} to {own} tokens, and this set was made with --max-length "
            f"{feeding.max_length}; make one without --max-length"
        )
    return family


def _refuse_clip(chosen: Format, family: str, needed: int, clip: str | None) -> None:
    if needed and clip is None:
        raise ValueError(f"{chosen.name} for {family} holds CLIP's embeddings as well; give --clip PIPELINE")
    if clip is not None and not needed:
        raise ValueError(f"{chosen.name} for {family} holds no embeddings of CLIP; leave --clip out")


def _refuse_unfinished(dataset: EmbeddingDataset) -> None:
    lengths = torch.from_numpy(dataset.lengths())
    missing, failed = int((lengths < 0).sum()), int((lengths == 0).sum())
    if missing:
        raise ValueError(f"{missing:,} of {len(dataset):,} samples are not encoded yet; run nai-t5 precompute again")
    if failed:
        raise ValueError(
            f"{failed:,} of {len(dataset):,} samples have failed; nai-t5 precompute status lists them. Take them out"
        )


def _refuse_names(dataset: EmbeddingDataset, chosen: Format, named: str) -> None:
    if chosen.place is None:
        return
    seen: dict[str, str] = {}
    for batch in known_samples(dataset.folder.samples(dataset.plan.edition)):
        for name, _, caption in batch:
            place = chosen.place(name, caption, named)
            path = PurePosixPath(place)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"the id {name!r} is no path within the folder that is written to")
            if not chosen.shares_files and seen.setdefault(place, name) != name:
                raise ValueError(
                    f"the ids {seen[place]!r} and {name!r} would both get the file {place}; {chosen.name} tells "
                    "samples apart by their files' names"
                )
