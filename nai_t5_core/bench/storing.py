"""How many bytes the embeddings of captions take on disk in each form, with what error, and how fast they are read.

    python -m nai_t5_core.bench.storing CAPTIONS.txt
    python -m nai_t5_core.bench.storing CAPTIONS.txt --width-of t5-v1_1-xxl --tokenizer tokenizer.json

Of the embedded model, or of a drawn one of another size with a single layer. Told are a shard's whole file over the
bytes of its rows in bfloat16, the relative error (L2), and megabytes of bfloat16 that are written and read a second.
"""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nai_t5_core.bench.captions import write_model
from nai_t5_core.datasets.recipe import Compression, Keeping, Store
from nai_t5_core.datasets.shard_files import Encoded, ShardFile, write_shard
from nai_t5_core.prompts.text_encoder import TextEncoder

# Of a caption, in tokens.
_LONGEST = 512


def measure(embeddings: list[Tensor], keeping: Keeping, file: Path) -> dict[str, float]:
    """Of embeddings [rows, d_model] in bfloat16, one of each prompt."""
    sizes, rows = torch.tensor([0, *map(len, embeddings)]), torch.cat(embeddings)
    keys = torch.arange(len(embeddings)).view(-1, 1).repeat(1, 4).view(torch.uint8)
    encoded = Encoded(rows, sizes.cumsum(0), sizes[1:].int(), keys, {})
    began = time.perf_counter()
    nbytes = write_shard(file, encoded, keeping)
    written = time.perf_counter()
    shard = ShardFile(file)
    read = torch.cat([shard.rows(place) for place in range(len(shard))]).float()
    seconds = time.perf_counter() - written
    plain = rows.numel() * 2
    return {
        "bytes": nbytes / plain,
        "error": float((read - rows.float()).norm() / rows.float().norm()),
        "written": plain / 1e6 / (written - began),
        "read": plain / 1e6 / seconds,
    }


def main(
    captions: Annotated[Path, typer.Argument(help="Text file, a caption a line.")],
    width_of: Annotated[str | None, typer.Option(help="A size of T5 such as t5-v1_1-xxl; drawn, of one layer.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="The tokenizer's file.")] = None,
    count: Annotated[int, typer.Option(help="Captions of the shard.")] = 400,
) -> None:
    texts = [line for line in captions.read_text(encoding="utf-8").split("\n") if line][:count]
    with TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", width_of, layers=1) if width_of else None
        encoder = TextEncoder.from_pretrained(model, "bfloat16", "cpu", tokenizer=tokenizer)
        embeddings = [rows.contiguous() for rows in encoder.encode(texts, max_length=_LONGEST).unpadded()]
        width, tokens = embeddings[0].shape[1], sum(map(len, embeddings)) / len(embeddings)
        title = f"d_model {width}, {tokens:.1f} rows a caption"
        table = Table("kept as", "compressed", "bytes", "error", "written", "read", title=title)
        for store, compress in product(get_args(Store), get_args(Compression)):
            found = measure(embeddings, Keeping(store, compress), Path(folder) / "shard.safetensors")
            rates = (f"{found['written']:,.0f} MB/s", f"{found['read']:,.0f} MB/s")
            table.add_row(store, compress, f"{found['bytes']:.3f}", f"{found['error']:.2%}", *rates)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
