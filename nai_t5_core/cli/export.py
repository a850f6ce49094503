"""``export``: a caption set in the files of a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nai_t5_core.cli.options import Json
from nai_t5_core.cli.terminal import counting, print_json, say


def export(
    folder: Annotated[Path, typer.Argument(help="The set's folder.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            help="musubi-wan, fastvideo, pixart, simpletuner, ltx, ai-toolkit, sd-scripts-flux or sd-scripts-sd3."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    clip: Annotated[
        str | None, typer.Option(help="A diffusers pipeline with CLIP's encoders, for families that read these too.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="ai-toolkit's name of the model, such as wan22_14b: it is in the files' names.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a caption set of precompute in the form that a trainer reads."""
    from nai_t5_core.datasets.exports import export as write
    from nai_t5_core.facts.paths import user_path

    with counting(f"writing for {to}") as progress:
        samples = write(folder, to, user_path(out), clip, arch, progress)
    if as_json:
        print_json({"samples": samples, "out": str(out)})
    else:
        say(f"wrote {samples:,} samples for {to} to {out}")
