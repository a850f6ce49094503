"""``bench-kinds``: what quantised weights take, lose and cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nai_t5_core.cli.options import Dtype, DtypeOption, Json
from nai_t5_core.cli.terminal import out, print_json, say, status


def bench_kinds(
    size: Annotated[str, typer.Argument(help="A published size; the weights are random.")] = "t5-v1_1-base",
    dtype: DtypeOption = Dtype.auto,
    layers: Annotated[int | None, typer.Option(help="Fewer layers than the size has.")] = None,
    kinds: Annotated[str | None, typer.Option(metavar="KIND,…", help="Only these; a wrong one lists all.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads on the CPU.")] = None,
    repeats: Annotated[int, typer.Option(help="Encodes that count.")] = 3,
    against: Annotated[
        str,
        typer.Option(help="llama-cpp-python: time llama.cpp's encoder beside ours instead, on the same GGUF files."),
    ] = "",
    write: Annotated[Path | None, typer.Option("--markdown", help="Also write the table as Markdown.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file with size against accuracy.")] = None,
    as_json: Json = False,
) -> None:
    """Compare kinds of quantised weights: bits, quantiles of the error with and without outliers, and times."""
    import torch
    from rich.markdown import Markdown

    from nai_t5_core.backends.auto_dtype import resolve_dtype
    from nai_t5_core.bench.kinds import markdown, measure_kinds
    from nai_t5_core.bench.kinds_against import markdown_against, measure_against_llama_cpp
    from nai_t5_core.bench.kinds_plot import plot as draw
    from nai_t5_core.bench.llama_cpp_peer import LLAMA_CPP
    from nai_t5_core.facts.config import named_config
    from nai_t5_core.weights.whole_files import write_whole

    if against not in ("", LLAMA_CPP):
        raise ValueError(f"--against {against}: kinds are compared with {LLAMA_CPP} alone")
    if against and plot is not None:
        raise ValueError("--plot draws size and accuracy, which --against does not measure; leave one of them out")

    config = named_config(size).encoder_only()
    if layers is not None:
        config = config.model_copy(update={"num_layers": layers})
    chosen = resolve_dtype(dtype.value, torch.device("cpu"))
    wanted = kinds.split(",") if kinds else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with status("measuring") as tell:
            if against:
                compared = measure_against_llama_cpp(
                    config, wanted or ("BF16", "F16", "Q8_0", "Q4_K"), chosen, repeats=repeats, progress=tell
                )
                table, found = markdown_against(compared), [row.to_dict() for row in compared]
            else:
                rows = measure_kinds(config, chosen, repeats=repeats, kinds=wanted, progress=tell)
                table, found = markdown(rows), [row.to_dict() for row in rows]
                if plot is not None:
                    draw(rows, size, plot)
    finally:
        torch.set_num_threads(before)
    if write is not None:
        write_whole(write, table)
    if as_json:
        print_json({"size": size, "rows": found})
        return
    out.print(Markdown(table))
    for path in filter(None, (write, plot)):
        say(f"wrote {path}")
