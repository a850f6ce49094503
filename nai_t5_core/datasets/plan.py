"""The plan of a set: which prompts it has, and which shard each is in.

A plan only grows: prompts that have a shard keep it, and new ones get new shards. It is published by the replacement of
``plan.json``, until which nothing that is there is changed: each edition has a file of samples of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nai_t5_core.datasets.captions import Columns, read_captions
from nai_t5_core.datasets.folder import SetFolder, lasting
from nai_t5_core.datasets.ledger import Ledger, OtherCaptionError, Sample
from nai_t5_core.datasets.prompt_files import Shard, known_keys, write_prompts
from nai_t5_core.datasets.recipe import Recipe, differences
from nai_t5_core.datasets.samples import known_samples, write_samples
from nai_t5_core.datasets.tokens import PromptMaker, made_of
from nai_t5_core.facts.nested_text import parse_object, shown
from nai_t5_core.weights.whole_files import alone_in

FORMAT = 1
# What a run leaves that was killed before its plan was complete.
_OF_A_PLAN = ("plan", "planning.sqlite")
Told = Callable[[int], None]
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Input:
    """A file that was planned; the hash is of its content and of the columns' names.

    Attributes:
        numbered: whether the numbers of the rows are the ids; None in plans of versions that did not note it.
    """

    name: str
    sha256: str
    rows: int
    numbered: bool | None = None


@dataclass(frozen=True)
class Plan:
    """What ``plan.json`` says.

    Attributes:
        recipe: what every run has to have in common.
        samples: ids that have a prompt.
        edition: how often it was published before; the samples' file has its number.
    """

    recipe: Recipe
    inputs: tuple[Input, ...] = ()
    shards: tuple[Shard, ...] = ()
    samples: int = 0
    edition: int = 0

    @property
    def prompts(self) -> int:
        return sum(shard.prompts for shard in self.shards)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def cut(self) -> int:
        """Prompts that were longer than allowed."""
        return sum(shard.cut for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Of all rows as they are stored, before compression."""
        return self.rows * self.recipe.row_bytes

    def as_json(self) -> str:
        values = {
            "format": FORMAT,
            "edition": self.edition,
            "recipe": self.recipe.as_dict(),
            "inputs": [vars(given) for given in self.inputs],
            "samples": self.samples,
            "shards": [vars(shard) for shard in self.shards],
        }
        return json.dumps(values, indent=1) + "\n"


def read_plan(folder: SetFolder) -> Plan | None:
    """The plan in a folder; None where there is none.

    Raises:
        ValueError: it is damaged, or of a version that this one cannot read.
    """
    if not folder.plan.is_file():
        return None
    try:
        values = parse_object(folder.plan.read_bytes())
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {shown(values['format'])}, and this version reads {FORMAT}")
        return Plan(
            Recipe.from_dict(values["recipe"]),
            tuple(Input(**given) for given in values["inputs"]),
            tuple(Shard(**shard) for shard in values["shards"]),
            values["samples"],
            values["edition"],
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder.plan} is no plan of a caption set: {reason}") from error


def existing_plan(folder: SetFolder) -> Plan:
    """The plan in a folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    plan = read_plan(folder)
    if plan is None:
        raise ValueError(f"{folder.path} holds no caption set (no plan.json); nai-t5 precompute makes one")
    return plan


@dataclass
class Planner:
    """Adds the captions of files to a set.

    Attributes:
        skip_bad: leave rows without a caption out; else they are refused.
        left_out: how many were.
        processes: that tokenize; by default as many as there are processors.
    """

    folder: SetFolder
    recipe: Recipe
    maker: PromptMaker
    columns: Columns
    skip_bad: bool = False
    processes: int | None = None
    told: Told = lambda rows: None
    left_out: int = field(default=0, init=False)
    _first_bad: str = field(default="", init=False)
    _rows: int = field(default=0, init=False)

    def plan(self, files: Sequence[Path]) -> Plan:
        """The plan with all rows of the files. Files that are in it already are not read again but to hash them.

        Raises:
            ValueError: the folder has something else, or a set of another recipe; a file cannot be read; an id is given
                to two captions; a caption is no text, unless such rows are left out. Nothing has then been changed.
            OSError: the disk is full.
        """
        before = self._begin()
        given = self.contents_of(files)
        if {old.sha256 for old in before.inputs} >= set(given.values()):
            return before
        self.folder.prompts_folder.mkdir(parents=True, exist_ok=True)
        try:
            return self._add_all(given)
        except BaseException:
            # A folder that was made for this; one that holds anything stays.
            with suppress(OSError):
                self.folder.prompts_folder.rmdir()
                self.folder.path.rmdir()
            raise

    def _add_all(self, given: dict[Path, str]) -> Plan:
        with alone_in(self.folder.path), closing(Ledger(self.folder.ledger)) as ledger:
            # Another run may have published a plan before this one had the folder for itself.
            before = self._begin()
            known = {old.sha256: old for old in before.inputs}
            self._remember(before, ledger)
            new = []
            for file, contents in given.items():
                if contents in known:
                    self._rows += known[contents].rows
                    continue
                first = self._rows
                try:
                    self._add(file, ledger)
                except OtherCaptionError as error:
                    raise OtherCaptionError(f"{file}: {error}. {self._how_ids_are_given(before)}") from error
                new.append(Input(file.name, contents, self._rows - first, self._numbers))
            self._refuse_bad()
            if not ledger.sample_count:
                raise ValueError(f"{', '.join(map(str, given))}: no captions; nothing was changed")
            return self._publish(before, new, ledger)

    def _remember(self, before: Plan, ledger: Ledger) -> None:
        """What was planned before: the shards' keys, and the samples."""
        if not before.shards:
            return
        for keys in known_keys(self.folder, len(before.shards), before.recipe):
            ledger.add_known(keys)
        for samples in known_samples(self.folder.samples(before.edition)):
            if self._numbers and any(old.numbered is None for old in before.inputs):
                self._refuse_what_is_no_number(samples)
            ledger.add_known_samples(samples)

    @property
    def _numbers(self) -> bool:
        """Whether rows are numbered, as no column has their ids."""
        return self.columns.id is None

    def _refuse_other_ids(self, before: Plan) -> None:
        other = next((old for old in before.inputs if old.numbered is (not self._numbers)), None)
        if other is None:
            return
        if self._numbers:
            raise ValueError(self._has_ids_of_a_column(f"that of {shown(other.name)}"))
        raise ValueError(
            f"{self.folder.path} has the numbers of the rows as ids, such as those of {shown(other.name)}, and --id "
            f"{self.columns.id} would give others. Leave --id out, or give another folder"
        )

    def _refuse_what_is_no_number(self, samples: list[Sample]) -> None:
        """All that can be told where it was not noted how ids were given."""
        name = next((name for name, _, _ in samples if not name.isdecimal()), None)
        if name is not None:
            raise ValueError(self._has_ids_of_a_column(shown(name)))

    def _has_ids_of_a_column(self, such: str) -> str:
        return (
            f"{self.folder.path} has ids of a column, such as {such}, and without --id the rows would be numbered. "
            "Give --id COLUMN, or another folder"
        )

    def contents_of(self, files: Sequence[Path]) -> dict[Path, str]:
        """The hash of each file and of what is read of it.

        Raises:
            ValueError: a file cannot be read.
        """
        return {file: _contents(file, self.columns) for file in files}

    def planned(self, contents: Collection[str]) -> Plan | None:
        """The plan, if another process has planned files with these hashes in the meantime.

        Raises:
            ValueError: the folder has something else, or a set of another recipe.
        """
        plan = self._begin()
        return plan if {old.sha256 for old in plan.inputs} >= set(contents) else None

    def _begin(self) -> Plan:
        if self.folder.path.is_file():
            raise ValueError(f"{self.folder.path} is a file; a set needs a folder")
        before = read_plan(self.folder)
        if before is None:
            there = sorted(path.name for path in self.folder.path.glob("*")) if self.folder.path.exists() else []
            left = (*_OF_A_PLAN, *(file.name for file in self.folder.all_samples()))
            strangers = [name for name in there if name not in left and not name.endswith(".part")]
            if strangers:
                raise ValueError(
                    f"{self.folder.path} holds {shown(strangers[0])} and no plan.json: it is no caption set. "
                    "Give a new folder"
                )
            return Plan(self.recipe)
        found = differences(before.recipe.as_dict(), self.recipe.as_dict())
        if found:
            raise ValueError(
                f"{self.folder.path} is a set of other settings: {'; '.join(found)}. Give the same ones, or another "
                "folder"
            )
        self._refuse_other_ids(before)
        return before

    def _add(self, file: Path, ledger: Ledger) -> None:
        for ids, prompts in made_of(self.maker, self._batches(file), self.processes):
            names, captions = ids
            ledger.add(
                [(name, prompt.key, text) for name, prompt, text in zip(names, prompts, captions, strict=True)],
                [(self.recipe.feeding.kept_rows(prompt.tokens), prompt) for prompt in prompts],
            )
            self.told(len(prompts))

    def _how_ids_are_given(self, before: Plan) -> str:
        if self.columns.id is not None:
            return "Each id needs one caption"
        earlier = ", ".join(old.name for old in before.inputs) or "those of the set"
        return (
            "Without --id, the numbers of the rows of all files that are given are the ids: give the earlier files "
            f"({earlier}) before new ones, which does not read them again, or ids by --id"
        )

    def _batches(self, file: Path) -> Iterator[tuple[tuple[list[str], list[str]], list[str]]]:
        """Ids and captions of the rows that have both, and the captions again, to be made prompts of."""
        first = self._rows
        for rows in read_captions(file, self.columns):
            names: list[str] = []
            captions: list[str] = []
            for place, caption in enumerate(rows.captions):
                number = first + rows.first + place
                name = number if rows.ids is None else rows.ids[place]
                fault = _fault(name, caption)
                if fault:
                    self.left_out += 1
                    row = f"row {rows.first + place:,} of {file} (counted from 0)"
                    self._first_bad = self._first_bad or f"{row} {fault}"
                    continue
                names.append(str(name))
                captions.append(caption)
            self._rows = first + rows.first + len(rows.captions)
            if captions:
                yield (names, captions), captions

    def _refuse_bad(self) -> None:
        if self.left_out and not self.skip_bad:
            raise ValueError(
                f"{self.left_out:,} of {self._rows:,} rows have no caption or no id; the first: {self._first_bad}. "
                "Nothing was changed. Mend them, or leave such rows out with --skip-bad"
            )

    def _publish(self, before: Plan, new: list[Input], ledger: Ledger) -> Plan:
        shards = write_prompts(self.folder, self.recipe, len(before.shards), ledger.new_prompts())
        edition = before.edition + 1
        write_samples(self.folder.samples(edition), ledger.samples())
        plan = Plan(self.recipe, (*before.inputs, *new), (*before.shards, *shards), ledger.sample_count, edition)
        with lasting(self.folder.plan) as partial:
            partial.write_text(plan.as_json())
        for file in self.folder.all_samples():
            # Who has read the plan before now may still open its samples.
            if file not in (self.folder.samples(before.edition), self.folder.samples(edition)):
                file.unlink()
        return plan


def _fault(name: Any, caption: Any) -> str:
    if not isinstance(caption, str):
        return f"has {'no caption' if caption is None else f'the caption {shown(caption)}, which is no text'}"
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        return f"has {'no id' if name is None else f'the id {shown(name)}, which is neither text nor a whole number'}"
    if _SURROGATE.search(caption) or _SURROGATE.search(str(name)):
        return "has half a pair of surrogates in its caption or id, which is no character"
    return ""


def _contents(file: Path, columns: Columns) -> str:
    """The hash of a file, and of which columns are read."""
    try:
        with file.open("rb") as opened:
            digest = hashlib.sha256(f"{columns.caption}\n{columns.id}\n".encode())
            while chunk := opened.read(1 << 22):
                digest.update(chunk)
            return digest.hexdigest()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
