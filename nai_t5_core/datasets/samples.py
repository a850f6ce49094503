"""``samples-NNNNN.parquet``: which prompt each id has."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from nai_t5_core.datasets.arrow import arrow
from nai_t5_core.datasets.folder import lasting
from nai_t5_core.datasets.ledger import Sample

_AT_A_TIME = 65_536


def schema() -> Any:
    pa = arrow()
    return pa.schema([("id", pa.string()), ("key", pa.binary(32)), ("caption", pa.string())])


def write_samples(file: Path, samples: Iterator[Sample]) -> None:
    """Writes all samples, which come sorted by id."""
    pa, parquet = arrow(), arrow("parquet")
    with lasting(file) as partial, parquet.ParquetWriter(partial, schema(), compression="zstd") as writer:
        while batch := list(islice(samples, _AT_A_TIME)):
            columns = [
                pa.array(values, field.type) for values, field in zip(zip(*batch, strict=True), schema(), strict=True)
            ]
            writer.write_table(pa.table(columns, schema=schema()))


def known_samples(file: Path) -> Iterator[list[Sample]]:
    for batch in arrow("parquet").ParquetFile(file).iter_batches(_AT_A_TIME):
        yield list(zip(*(batch.column(name).to_pylist() for name in ("id", "key", "caption")), strict=True))
