"""``parity``, ``bench`` and ``bench-generate``: exactness and speed beside others; ``estimate``: by data sheets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nai_t5_core.cli.options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    Json,
    ModelArgument,
    Products,
    ProductsOption,
    ScalesOption,
    Subfolder,
)
from nai_t5_core.cli.terminal import out, print_json, print_whole, say, status
from nai_t5_core.facts.config import named_config

if TYPE_CHECKING:
    from rich.console import RenderableType

    from nai_t5_core.bench.roofline import Estimate

Random = Annotated[
    str | None, typer.Option("--random", metavar="SIZE", help="Random weights of a published size, such as umt5-small.")
]
_PEERS = "Peers, joined by commas: transformers, nai-t5, openvino, llama-cpp-python."
Against = Annotated[str, typer.Option(help=_PEERS)]


def parity(
    model: ModelArgument = None,
    random: Random = None,
    layers: Annotated[int | None, typer.Option(help="With --random: only this many layers.")] = None,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="With --random: large channels, as trained models have them.")
    ] = False,
    dtypes: Annotated[str, typer.Option(help="Compute dtypes, joined by commas.")] = "float32,float64",
    against: Against = "transformers",
    prompt_lengths: Annotated[
        str,
        typer.Option(help="Tokens of each prompt, joined by commas; many tell the outer quantiles better."),
    ] = "150,1,77,30",
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Also compare the residual after each layer.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Also measure our 8-bit form.")] = False,
    original: Annotated[
        str | None, typer.Option(help="The checkpoint that the model was quantised of: what quantising has cost.")
    ] = None,
    decoder: Annotated[bool, typer.Option("--decoder", help="Also the decoder, of a whole model.")] = False,
    scales: ScalesOption = None,
    products: ProductsOption = Products.auto,
    plot: Annotated[Path | None, typer.Option(help="PNG file with the errors of all.")] = None,
    subfolder: Subfolder = "",
    as_json: Json = False,
) -> None:
    """Measure the difference from transformers in float64, in quantiles; exit status 1 if a tolerance is exceeded."""
    import torch

    from nai_t5_core.backends.choices import refuse_missing
    from nai_t5_core.bench import parity_report
    from nai_t5_core.bench.decoder_parity import measure_decoder_parity
    from nai_t5_core.bench.parity import measure_parity
    from nai_t5_core.bench.peers import hf_state, random_state
    from nai_t5_core.weights.examine import decoder_faults, examine, settle_head
    from nai_t5_core.weights.load import choose_decoder_scales, choose_scales
    from nai_t5_core.weights.scales_file import read_decoder_scales, read_scales

    refuse_missing(products.value, torch.device("cpu"), torch.float32)
    chosen_for_decoder = reference = None
    if original is not None and (random is not None or decoder):
        raise ValueError("--original goes with a model, and with its encoder alone: without --random and --decoder")
    if random is not None:
        config = named_config(random) if decoder else named_config(random).encoder_only()
        config = config.with_layers(layers)
        state, chosen = random_state(config, outliers=outliers), read_scales(scales) if scales else None
        if scales and decoder:
            chosen_for_decoder = read_decoder_scales(scales)
    else:
        examination = examine(model, subfolder)
        if decoder:
            settle_head(examination)
            examination.faults += decoder_faults(examination)
            chosen_for_decoder = choose_decoder_scales(examination, torch.float16, scales or "auto")
        else:
            examination.config = examination.config.encoder_only()
        examination.refuse_faults()
        config, state = examination.config, hf_state(examination)
        chosen = choose_scales(examination, torch.float16, scales or "auto")
        if original is not None:
            before = examine(original)
            before.config = before.config.encoder_only()
            before.refuse_faults()
            reference = hf_state(before)
    peers, lengths = against.split(",") if against else (), _numbers("--prompt-lengths", prompt_lengths)
    with status("measuring") as tell:
        report = measure_parity(
            config,
            state,
            dtypes.split(","),
            peers,
            lengths,
            scales=chosen,
            per_layer=per_layer,
            int8=int8,
            progress=tell,
            reference_state=reference,
            quantised_since=reference is not None,
            products=products.value,
        )
        if decoder:
            found = measure_decoder_parity(
                config,
                state,
                dtypes.split(","),
                peers,
                lengths,
                scales=chosen,
                decoder_scales=chosen_for_decoder,
                progress=tell,
            )
            report = dataclasses.replace(
                report,
                decoder_hidden=found.hidden,
                logits=found.logits,
                skipped=(*report.skipped, *found.skipped),
            )
    if plot is not None:
        parity_report.plot(report, plot)
    if as_json:
        print_json(report.to_dict())
    else:
        out.print(parity_report.render(report))
        if plot is not None:
            say(f"wrote {plot}")
    if not report.passed:
        raise typer.Exit(1)


def _numbers(option: str, joined: str) -> list[int]:
    try:
        return [int(part) for part in joined.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} {joined!r}; give whole numbers joined by commas, such as 32 or 12,77,30") from error


def bench(
    size: Annotated[str, typer.Argument(help="A published size; the weights are random.")] = "t5-v1_1-base",
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads on the CPU.")] = None,
    layers: Annotated[int | None, typer.Option(help="Fewer layers than the size has.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds that count.")] = 7,
    cases: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…", help="Only these, by short names such as padded,32,512 (a wrong one lists all), or none."
        ),
    ] = None,
    against: Against = "transformers,nai-t5",
    comfyui: Annotated[Path | None, typer.Option(help="A checkout of ComfyUI, whose T5 joins the peers.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Each also under torch.compile.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Ours also in 8 bits.")] = False,
    onednn: Annotated[bool, typer.Option("--onednn", help="Ours also without its own kernels.")] = False,
    products: ProductsOption = Products.auto,
    load: Annotated[bool, typer.Option(help="Also measure cold start and memory while loading.")] = True,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables as Markdown.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file with the times relative to ours.")] = None,
    as_json: Json = False,
) -> None:
    """Time the encoder beside its peers: the same weights, one process, taking turns."""
    from nai_t5_core.bench import speed as timing
    from nai_t5_core.weights.whole_files import write_whole

    chosen = timing.CASES if cases is None else timing.cases_named(cases.split(","))
    if plot is not None and not chosen:
        raise ValueError("--plot draws cases, and --cases none leaves nothing to draw")
    with status("preparing") as tell:
        report = timing.run_bench(
            size,
            dtype.value,
            threads,
            repeats,
            tuple(against.split(",")) if against else (),
            chosen,
            with_load=load,
            device=device,
            progress=tell,
            comfyui=comfyui,
            compiled=compiled,
            int8=int8,
            onednn=onednn,
            products=products.value,
            layers=layers,
        )
    if markdown is not None:
        write_whole(markdown, timing.markdown(report))
    if plot is not None:
        timing.plot(report, plot)
    if as_json:
        print_json(report.to_dict())
        return
    print_whole(timing.render(report))
    for path in filter(None, (markdown, plot)):
        say(f"wrote {path}")


def bench_generate(
    size: Annotated[str, typer.Argument(help="A published size, such as t5-v1_1-base.")] = "t5-v1_1-base",
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads on the CPU.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds that count.")] = 3,
    cases: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="Only these: beams, greedy, greedy-8; all by default.")
    ] = None,
    prompt_length: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 48,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 64,
    against: Annotated[
        str, typer.Option(help="Peers, joined by commas: transformers, ctranslate2; none if empty.")
    ] = "transformers",
    int8: Annotated[bool, typer.Option("--int8", help="Ours also in 8 bits.")] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="Ours also with steps under torch.compile.")] = False,
    products: ProductsOption = Products.auto,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables as Markdown.")] = None,
    as_json: Json = False,
) -> None:
    """Time generation beside its peers: the same weights and steps, one process, taking turns."""
    from nai_t5_core.bench import speed as timing
    from nai_t5_core.weights.whole_files import write_whole

    chosen = timing.GENERATION_CASES if cases is None else timing.generation_cases_named(cases.split(","))
    with status("preparing") as tell:
        report = timing.bench_generation(
            size,
            dtype.value,
            threads,
            repeats,
            chosen,
            prompt_length,
            new_tokens,
            against=tuple(against.split(",")) if against else (),
            int8=int8,
            compiled=compiled,
            device=device,
            progress=tell,
            products=products.value,
        )
    if markdown is not None:
        write_whole(markdown, timing.generation_markdown(report))
    if as_json:
        print_json(report.to_dict())
        return
    print_whole(timing.render_generation(report))
    if markdown is not None:
        say(f"wrote {markdown}")


def estimate(
    size: Annotated[str, typer.Argument(help="A published size, such as t5-v1_1-xxl.")],
    tokens: Annotated[str, typer.Option(help="Tokens of each prompt of one batch, joined by commas.")] = "32",
    padded_to: Annotated[int, typer.Option(help="The length that others pad to and compute.")] = 512,
    as_json: Json = False,
) -> None:
    """Estimate encode times on GPUs, on paper: FLOPs and bytes at the rates of data sheets. Nothing is run."""
    from nai_t5_core.bench import roofline

    lengths = _numbers("--tokens", tokens)
    found = roofline.estimate(named_config(size).encoder_only(), size, lengths, padded_to)
    if as_json:
        print_json(found.to_dict())
    else:
        out.print(_estimate_table(found))


def _estimate_table(found: Estimate) -> RenderableType:
    from rich.console import Group
    from rich.table import Table

    title = f"{found.size}, float16: an estimate on paper, not measured"
    table = Table("device", f"padded to {found.padded_to}", "real tokens only", "ratio", title=title)
    for item in found.devices:
        cells = (f"{time.seconds * 1e3:.2f} ms ({time.bound_by})" for time in (item.padded, item.ours))
        table.add_row(item.device.name, *cells, f"{item.ratio:.1f}×")
    work = "; ".join(
        f"{name} {each.flops / 1e9:.0f} GFLOPs, {each.nbytes / 1e9:.2f} GB"
        for name, each in (("padded", found.padded), ("real tokens only", found.ours))
    )
    lengths = ", ".join(map(str, found.prompt_lengths))
    notes = (
        f"prompts of {lengths} tokens; {work}",
        "the larger of FLOPs / data-sheet rate and bytes / data-sheet bandwidth; a real encode takes longer",
    )
    return Group(table, *notes)
