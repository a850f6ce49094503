"""``cache status``, ``clear``, ``verify`` and ``bench``: the embeddings that are kept in a folder, and their cost."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from nai_t5_core.cli.options import Json
from nai_t5_core.cli.terminal import out, print_json, say, size, working
from nai_t5_core.cli.terminal import status as status_of

if TYPE_CHECKING:
    from nai_t5_core.bench.cache import CacheTimes
    from nai_t5_core.bench.speed.results import Spread
    from nai_t5_core.prompts.cache.disk import DiskStore

app = typer.Typer(help="The embeddings that encode --cache and others keep, so that no prompt is encoded twice.")

FolderArgument = Annotated[Path | None, typer.Argument(help="The cache's folder; the default one if it is left out.")]


@app.command()
def status(folder: FolderArgument = None, as_json: Json = False) -> None:
    """How many embeddings are kept, their size, and when they were used."""
    disk = _disk(folder)
    kept = disk.kept()
    nbytes = sum(entry.nbytes for entry in kept)
    if as_json:
        used = [kept[0].used, kept[-1].used] if kept else None
        print_json({"folder": str(disk.folder), "embeddings": len(kept), "bytes": nbytes, "used": used})
        return
    say(f"{disk.folder}: {len(kept)} embeddings, {size(nbytes)}")
    if kept:
        first, last = (datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M") for entry in (kept[0], kept[-1]))
        say(f"the last one was used {last}, and the one that nobody has used for longest {first}")


@app.command()
def clear(folder: FolderArgument = None, as_json: Json = False) -> None:
    """Remove all embeddings. Other files in the folder stay."""
    disk = _disk(folder)
    removed = disk.clear()
    nbytes = sum(entry.nbytes for entry in removed)
    if as_json:
        print_json({"folder": str(disk.folder), "removed": len(removed), "bytes": nbytes})
        return
    say(f"{disk.folder}: removed {len(removed)} embeddings, {size(nbytes)}")


@app.command()
def verify(
    folder: FolderArgument = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove what is damaged.")] = False,
    as_json: Json = False,
) -> None:
    """Read all embeddings and compare them with their checksums; exit status 1 if one is damaged and not removed."""
    disk = _disk(folder)
    with working("reading"):
        kept = len(disk.kept())
        faults = disk.faults()
    for path in faults if remove else ():
        path.unlink(missing_ok=True)
    if as_json:
        damaged = {str(path): reason for path, reason in faults.items()}
        print_json({"folder": str(disk.folder), "embeddings": kept, "damaged": damaged, "removed": remove})
    else:
        for path, reason in faults.items():
            say(f"{path}: {reason}", title="removed" if remove else "damaged", style="yellow")
        say(f"{disk.folder}: {kept} embeddings, {len(faults)} of them damaged")
    if faults and not remove:
        raise typer.Exit(1)


@app.command()
def bench(
    model_size: Annotated[
        str, typer.Argument(metavar="size", help="A published size; the weights are random.")
    ] = "t5-v1_1-large",
    rounds: Annotated[int, typer.Option(help="Measurements that count.")] = 41,
    starts: Annotated[int, typer.Option(help="Rounds of processes; 0 for none.")] = 15,
    threads: Annotated[int | None, typer.Option(help="Threads on the CPU.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what the cache takes here: hits, prompts that are not kept, and the start of a process. Medians."""
    from nai_t5_core.bench.cache import measure_cache
    from nai_t5_core.bench.speed.machine import threads_set

    with threads_set(threads), status_of("measuring") as tell:
        found = measure_cache(model_size, rounds, starts, tell)
    if as_json:
        print_json({"size": model_size, "rounds": rounds, **found.to_dict()})
        return
    table = Table("", "median", "lowest", "highest", title=f"{model_size}, 32 tokens; hits of 77 × 4096 in bfloat16")
    for what, spread, unit in _rows_of(found):
        table.add_row(what, *(f"{number:.3f}{unit}" for number in (spread.median, spread.low, spread.high)))
    out.print(table)


def _rows_of(found: CacheTimes) -> Iterator[tuple[str, Spread, str]]:
    yield "a hit in memory", found.hit_memory, " ms"
    yield "a hit on the disk", found.hit_disk, " ms"
    yield "a look for what is not kept", found.miss, " ms"
    yield "an entry written in the background", found.write, " ms"
    yield "an encode without a cache", found.encode, " ms"
    for kind, ratio in found.cost.items():
        yield f"one that is kept ({kind}) / without a cache", ratio, ""
    for way, ratio in found.start.items():
        yield f"process with a hit ({way}) / one that imports torch", ratio, ""


def _disk(folder: Path | None) -> DiskStore:
    """The store of a folder.

    Raises:
        ValueError: it is none.
    """
    from nai_t5_core.prompts.cache.disk import DiskStore
    from nai_t5_core.prompts.cache.store import DISK_LIMIT, default_folder

    if folder is not None and not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give that of a cache, or none for {default_folder()}")
    return DiskStore(folder or default_folder(), DISK_LIMIT)
