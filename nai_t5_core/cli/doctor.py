"""``doctor``: describes the machine, says which backends run on it, checks their results and times them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

import typer

from nai_t5_core.cli.options import DeviceOption, Json
from nai_t5_core.cli.terminal import err, out, print_json, say


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="What to time: a published size (random weights), or a hub id, folder or file; by default a size."
        ),
    ] = None,
    device: DeviceOption = "auto",
    full: Annotated[
        bool, typer.Option("--full", help="Also the largest size, peers, and compiled graphs; minutes.")
    ] = False,
    budget: Annotated[float, typer.Option(help="Seconds for everything; what does not fit is left out.")] = 480.0,
    only: Annotated[
        str | None, typer.Option(metavar="STEP,…", help="Only these steps (a wrong one lists all).")
    ] = None,
    results: Annotated[Path | None, typer.Option(help="File for what each step found, as it is found.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the report as Markdown.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Also write the report as a picture, an SVG file.")] = None,
    as_json: Json = False,
) -> None:
    """Examine this machine: what can run, whether it computes right, how fast, and which settings suit it.

    On a card it also keeps, in the user's cache, which products and attention are fastest there; encoders use it.
    """
    from nai_t5_core.bench.doctor import DoctorSettings, examine_machine
    from nai_t5_core.bench.doctor.advice import advice
    from nai_t5_core.bench.doctor.kept_choice import write_choice
    from nai_t5_core.bench.doctor.report import as_markdown, as_svg, render
    from nai_t5_core.weights.whole_files import write_whole

    steps = () if only is None else tuple(name.strip() for name in only.split(","))
    settings = DoctorSettings(device, model, full, budget, steps, results)
    for written in filter(None, (results, markdown, picture)):
        _refuse_unwritable(written)
    with err.status("looking") as status:
        diagnosis = examine_machine(settings, status.update)
    kept = write_choice(diagnosis)
    if as_json:
        print_json({**diagnosis.to_dict(), "advice": advice(diagnosis), "kept": kept})
    else:
        out.print(render(diagnosis))
        if kept:
            say(kept)
    # Told before it is written: a disk that has become full takes no report away.
    for path, form in ((markdown, as_markdown), (picture, as_svg)):
        if path is not None:
            write_whole(path, form(diagnosis))
            say(f"wrote {path}", err)
    if not diagnosis.passed:
        raise typer.Exit(1)


def _refuse_unwritable(path: Path) -> None:
    """An OSError now rather than after minutes of work."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into; make it, or name another")
    try:
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"{path.parent} cannot be written into ({error.strerror}); name another folder") from error
