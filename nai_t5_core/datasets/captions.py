"""Captions out of files of four kinds, a batch of rows at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nai_t5_core.datasets.arrow import arrow
from nai_t5_core.facts.nested_text import shown

ROWS_AT_A_TIME = 4096
# A field of a CSV file; the module's own limit of 128 kB is less than some texts have.
_LONGEST_FIELD = 1 << 27


@dataclass(frozen=True)
class Columns:
    """Where a row's caption and id are; without ``id`` the ids are the numbers of the rows."""

    caption: str = "caption"
    id: str | None = None

    @property
    def names(self) -> list[str]:
        return [self.caption] if self.id is None else [self.caption, self.id]


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a file, as the file has them: a caption or an id may be of any type, or None."""

    first: int
    captions: list[Any]
    ids: list[Any] | None


def read_captions(file: Path, columns: Columns) -> Iterator[Rows]:
    """The rows of a file, whose kind its name's ending tells.

    Raises:
        ValueError: another ending, a column that is not there, or a file that cannot be read as what it is called.
        MissingPackageError: a parquet file without pyarrow.
    """
    readers: dict[str, Callable[[Path, Columns], Iterator[list[Any]]]] = {
        ".parquet": _parquet,
        ".jsonl": _jsonl,
        ".csv": _csv,
        ".txt": _txt,
    }
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise ValueError(f"{file}: captions are read from files that end in {', '.join(readers)}")
    if not file.is_file():
        raise ValueError(f"{file} does not exist, or is no file")
    first = 0
    try:
        for batch in reader(file, columns):
            captions, *ids = batch
            yield Rows(first, captions, ids[0] if ids else None)
            first += len(captions)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8, somewhere after row {first:,}: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{file} is no CSV file, somewhere after row {first:,}: {error}") from error


def _refuse_missing(file: Path, columns: Columns, there: list[str]) -> None:
    missing = [name for name in columns.names if name not in there]
    if missing:
        raise ValueError(f"{file} has no column {shown(missing[0])}; it has: {', '.join(there) or 'none'}")


def _parquet(file: Path, columns: Columns) -> Iterator[list[Any]]:
    parquet, errors = arrow("parquet"), arrow().ArrowException
    try:
        opened = parquet.ParquetFile(file, memory_map=True)
        _refuse_missing(file, columns, list(opened.schema_arrow.names))
        for batch in opened.iter_batches(ROWS_AT_A_TIME, columns=columns.names):
            yield [batch.column(name).to_pylist() for name in columns.names]
    except (errors, OSError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}") from error


def _jsonl(file: Path, columns: Columns) -> Iterator[list[Any]]:
    with file.open(encoding="utf-8-sig") as lines:
        objects = (_object(file, number, line) for number, line in enumerate(lines, 1) if line.strip())
        seen: dict[str, None] = {}
        while batch := list(islice(objects, ROWS_AT_A_TIME)):
            seen |= dict.fromkeys(name for row in batch for name in row)
            yield [[row.get(name) for row in batch] for name in columns.names]
        # A line may leave a column out, as null; that no line has it is told as a wrong name.
        if seen:
            _refuse_missing(file, columns, list(seen))


def _object(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: line {number:,} is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{file}: line {number:,} is a JSON {type(row).__name__}, and an object is needed")
    return row


def _csv(file: Path, columns: Columns) -> Iterator[list[Any]]:
    csv.field_size_limit(_LONGEST_FIELD)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, strict=True)
        _refuse_missing(file, columns, list(rows.fieldnames or []))
        checked = _whole_rows(file, rows)
        while batch := list(islice(checked, ROWS_AT_A_TIME)):
            yield [[row[name] for row in batch] for name in columns.names]


def _whole_rows(file: Path, rows: csv.DictReader[str]) -> Iterator[dict[str, Any]]:
    for row in rows:
        # What has no column is under no name: the end of a caption, in most cases.
        if None in row:
            raise ValueError(
                f"{file}: line {rows.line_num:,} has more fields than there are columns; a caption with a comma in it "
                "needs quotes"
            )
        yield row


def _txt(file: Path, columns: Columns) -> Iterator[list[Any]]:
    if columns.id is not None:
        raise ValueError(
            f"{file} is plain text, a caption a line, and has no column {shown(columns.id)}; leave --id out"
        )
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        while batch := list(islice(lines, ROWS_AT_A_TIME)):
            yield [[line.removesuffix("\n").removesuffix("\r") for line in batch]]
