"""FastVideo's parquet files of texts alone: unpadded float32 as bytes, with their shape."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count, islice
from pathlib import Path

from nai_t5_core.datasets.arrow import arrow
from nai_t5_core.datasets.exports.sample import Format, Sample, whole

# Its reader turns a whole row group into Python's objects for each row that it wants.
_ROWS_OF_A_GROUP = 16
_ROWS_OF_A_FILE = 1024


def _write(samples: Iterable[Sample], out: Path) -> None:
    pa, parquet = arrow(), arrow("parquet")
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("text_embedding_bytes", pa.binary()),
            ("text_embedding_shape", pa.list_(pa.int64())),
            ("text_embedding_dtype", pa.string()),
            ("caption", pa.string()),
        ]
    )
    remaining = iter(samples)
    for number in count():
        piece = islice(remaining, _ROWS_OF_A_FILE)
        group = list(islice(piece, _ROWS_OF_A_GROUP))
        if not group:
            return
        with whole(out / f"text_{number:06d}.parquet") as partial, parquet.ParquetWriter(partial, schema) as writer:
            while group:
                writer.write_table(pa.Table.from_pylist([_row(sample) for sample in group], schema))
                group = list(islice(piece, _ROWS_OF_A_GROUP))


def _row(sample: Sample) -> dict[str, object]:
    states = sample.text.float()
    return {
        "id": sample.id,
        "text_embedding_bytes": states.numpy().tobytes(),
        "text_embedding_shape": list(states.shape),
        "text_embedding_dtype": "float32",
        "caption": sample.caption,
    }


FASTVIDEO = Format("fastvideo", _write)
