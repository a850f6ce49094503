"""``kernels build``: compiles our CPU kernels, which the first encode would otherwise wait for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from nai_t5_core.cli.options import Json
from nai_t5_core.cli.terminal import print_json, say, working

app = typer.Typer(help="The kernels, by which the encoder's blocks run on processors with AVX2 or AVX512.")


@app.callback()
def _only_its_commands() -> None:
    """Makes ``build`` a subcommand: typer merges a single command into its group unless the group has a callback."""


@app.command()
def build(
    products: Annotated[
        str | None, typer.Option(metavar="SET", help="The instruction set; by default the best of this processor.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile the kernels for this machine ahead; they are kept, and later processes load them."""
    from nai_t5_core.backends.kernels.build import (
        library,
        missing_for,
        nearest_set,
        prepare_kernels,
        why_not_kernels,
    )
    from nai_t5_core.backends.kernels.compilers import there
    from nai_t5_core.backends.kernels.sets import SETS, named
    from nai_t5_core.facts.paths import cache_folder

    if products is not None and products not in (names := [instructions.name for instructions in SETS]):
        raise ValueError(f"--products {products!r}; allowed: {', '.join(names)}")
    instructions = nearest_set() if products is None else named(products)
    if missing := missing_for(instructions):
        possible = [other.name for other in SETS if missing_for(other) is None]
        instead = f"; --products {' or '.join(possible)} can" if possible else ""
        raise ValueError(f"the kernels for {instructions.title} cannot be built here: {missing}{instead}")
    # One that is damaged is compiled anew.
    before = {file: file.stat().st_mtime_ns for file in there(instructions.recipe, cache_folder())}
    started = time.perf_counter()
    import torch  # noqa: F401 - the kernels use the threads that it has loaded

    with working("compiling the kernels"):
        failed = prepare_kernels(instructions)
    if failed:
        raise ValueError(f"the kernels for {instructions.title} cannot be built here: {failed}")
    file = Path(library(instructions)._name)
    was_there = before.get(file) == file.stat().st_mtime_ns
    seconds = 0.0 if was_there else time.perf_counter() - started
    unused = why_not_kernels()
    if as_json:
        told = {"products": instructions.name, "file": str(file), "was_there": was_there, "seconds": seconds}
        print_json({**told, "not_chosen_because": unused})
        return
    say(f"{instructions.title}: {'there already' if was_there else f'built in {seconds:.1f} s'}: {file}")
    if unused:
        say(f"an automatic choice does not take them: {unused}")
