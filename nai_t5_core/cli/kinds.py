"""``bench-kinds``: what quantised weights take, lose and cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from nai_t5_core.cli.options import Dtype, DtypeOption, Json, Products, ProductsOption
from nai_t5_core.cli.terminal import counted, print_json, print_whole, say, status

if TYPE_CHECKING:
    import torch

    from nai_t5_core.backends.choices import ProductsChoice
    from nai_t5_core.bench.speed.tables import Table
    from nai_t5_core.facts.config import T5Config


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
    products: ProductsOption = Products.auto,
    load: Annotated[
        bool,
        typer.Option(
            "--load",
            help="Load time and memory of each kind's file instead, each in fresh processes; files go to TMPDIR.",
        ),
    ] = False,
    lora: Annotated[
        int, typer.Option(metavar="RANK", help="Time with a live LoRA of this rank on every projection.")
    ] = 0,
    write: Annotated[Path | None, typer.Option("--markdown", help="Also write the table as Markdown.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file with size against accuracy.")] = None,
    as_json: Json = False,
) -> None:
    """Compare kinds of quantised weights: bits, quantiles of the error with and without outliers, and times."""
    from nai_t5_core.bench.speed.machine import threads_set
    from nai_t5_core.bench.speed.tables import as_markdown, for_terminal
    from nai_t5_core.facts.config import named_config
    from nai_t5_core.weights.whole_files import write_whole

    if load and against:
        raise ValueError("--load and --against are two measurements; leave one of them out")
    if plot is not None and (load or against):
        other = "--load" if load else "--against"
        raise ValueError(f"--plot draws size and accuracy, which {other} does not measure; leave one of them out")
    if lora and (load or against):
        other = "--load" if load else "--against"
        raise ValueError(f"--lora is for the times of kinds by themselves, and not with {other}; leave one of them out")
    if lora < 0:
        raise ValueError(f"--lora {lora}; a rank is 1 or more, and 0 is none")
    config = named_config(size).encoder_only().with_layers(layers)
    wanted = kinds.split(",") if kinds else None
    with status("measuring") as tell, threads_set(threads):
        settings = _Settings(size, config, dtype.value, wanted, repeats, products.value, threads, lora, tell)
        if load:
            found = _loading(settings)
        elif against:
            found = _beside(against, settings)
        else:
            found = _costs(settings, plot)
    if write is not None:
        write_whole(write, as_markdown(found.headline, [found.table], found.notes))
    if as_json:
        print_json({"size": size, "rows": found.rows})
        return
    print_whole(for_terminal(found.headline, [found.table], found.notes))
    for path in filter(None, (write, plot)):
        say(f"wrote {path}")


class _Settings(NamedTuple):
    size: str
    config: T5Config
    dtype: str
    kinds: list[str] | None
    repeats: int
    products: ProductsChoice
    threads: int | None
    lora: int
    tell: Callable[[str], None]

    def headline(self) -> str:
        layers, encodes = counted(self.config.num_layers, "layer"), counted(self.repeats, "encode")
        return f"{self.size}, {layers}, {self.described()}, medians of {encodes}"

    def described(self) -> str:
        return f"computed in {str(self.chosen_dtype()).removeprefix('torch.')}"

    def chosen_dtype(self) -> torch.dtype:
        from nai_t5_core.backends.auto_dtype import resolve_dtype
        from nai_t5_core.model.precision import resolve_device

        return resolve_dtype(self.dtype, resolve_device("cpu"))


class _Found(NamedTuple):
    headline: str
    table: Table
    notes: list[str]
    rows: list[dict[str, Any]]


def _costs(settings: _Settings, picture: Path | None) -> _Found:
    from nai_t5_core.bench.kinds import kinds_table, measure_kinds
    from nai_t5_core.bench.kinds_packing import PACKINGS, possible_kinds
    from nai_t5_core.bench.kinds_plot import plot

    size, config, _, kinds, repeats, products, _, lora, tell = settings
    dtype = settings.chosen_dtype()
    rows = measure_kinds(config, dtype, repeats=repeats, kinds=kinds, products=products, lora_rank=lora, progress=tell)
    absent = [] if kinds else [kind for kind in PACKINGS if kind not in possible_kinds()]
    if absent:
        say(f"left out, since gguf or llama-cpp-python, which pack them, are not installed: {', '.join(absent)}")
    if picture is not None:
        plot(rows, size, picture)
    return _Found(settings.headline(), *kinds_table(rows), [row.to_dict() for row in rows])


def _beside(peer: str, settings: _Settings) -> _Found:
    from nai_t5_core.bench.kinds_against import against_table, measure_against_llama_cpp
    from nai_t5_core.bench.llama_cpp_peer import LLAMA_CPP

    if peer != LLAMA_CPP:
        raise ValueError(f"--against {peer}: kinds are compared with {LLAMA_CPP} alone")
    if settings.products != "auto":
        raise ValueError("--products is not for --against, where ours computes as it is loaded; leave it out")
    _, config, _, kinds, repeats, _, _, _, tell = settings
    chosen = kinds or ["BF16", "F16", "Q8_0", "Q4_K"]
    rows = measure_against_llama_cpp(config, chosen, settings.chosen_dtype(), repeats=repeats, progress=tell)
    return _Found(settings.headline(), *against_table(rows), [row.to_dict() for row in rows])


def _loading(settings: _Settings) -> _Found:
    from nai_t5_core.bench.kinds_loading import loading_table, measure_kind_loading

    _, config, _, kinds, repeats, products, threads, _, tell = settings
    rows = measure_kind_loading(config, settings.chosen_dtype(), repeats, kinds, threads, products, tell)
    headline = f"{counted(len(rows), 'file')}, {settings.described()}, {counted(repeats, 'load')} of each in turn"
    return _Found(headline, *loading_table(rows), [row.to_dict() for row in rows])
