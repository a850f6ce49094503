"""``index.parquet``: where each prompt is. It is made of the shards, and can be made again."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from nai_t5_core.datasets.arrow import arrow
from nai_t5_core.datasets.folder import SetFolder, lasting
from nai_t5_core.datasets.shard_files import ShardFile

# The key of what tells which files an index was made of.
_SHARDS = b"shards"


def made_index(folder: SetFolder) -> Any:
    """A table of all prompts in the shards that are there: key, shard, place in it, rows and tokens.

    Prompts that failed have no rows.

    Raises:
        DamagedShardError: a shard is damaged.
    """
    pa = arrow()
    made_of = _shards_in(folder)
    numbers = list(folder.numbers_in(folder.shards_folder))
    parts = [_part(number, ShardFile(folder.shard(number))) for number in numbers]
    schema = pa.schema(
        [("key", pa.binary(32)), *((name, pa.int32()) for name in ("shard", "place", "rows", "tokens"))],
        metadata={_SHARDS: made_of},
    )
    return pa.Table.from_batches([pa.record_batch(part, schema=schema) for part in parts], schema)


def write_index(folder: SetFolder) -> None:
    table = made_index(folder)
    with lasting(folder.index) as partial:
        arrow("parquet").write_table(table, partial, compression="zstd")


def read_index(folder: SetFolder) -> Any:
    """The table of ``index.parquet``; made anew where that file is not there, or is of other shards than are."""
    if folder.index.is_file():
        table = arrow("parquet").read_table(folder.index)
        if (table.schema.metadata or {}).get(_SHARDS) == _shards_in(folder):
            return table
    return made_index(folder)


def _shards_in(folder: SetFolder) -> bytes:
    """A hash of the names and sizes of the shards' files."""
    digest = hashlib.sha256()
    for number in folder.numbers_in(folder.shards_folder):
        file = folder.shard(number)
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest().encode()


def _part(number: int, shard: ShardFile) -> list[Any]:
    pa = arrow()
    size = len(shard)
    keys = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), size, [None, pa.py_buffer(shard.keys.numpy().tobytes())])
    return [
        keys,
        pa.array(np.full(size, number, np.int32)),
        pa.array(np.arange(size, dtype=np.int32)),
        pa.array(shard.offsets.diff().int().numpy()),
        pa.array(shard.tokens.numpy()),
    ]
