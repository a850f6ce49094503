"""``parity`` and ``bench``: our encoder beside others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nai_t5_core.cli.options import DeviceOption, Dtype, DtypeOption, Json, ModelArgument, ScalesOption, Subfolder
from nai_t5_core.cli.terminal import err, out, print_json, say
from nai_t5_core.config import named_config

Random = Annotated[
    str | None, typer.Option("--random", metavar="SIZE", help="Random weights of a published size, such as umt5-small.")
]
Against = Annotated[str, typer.Option(help="Peers, joined by commas: transformers, nai-t5.")]


def parity(
    model: ModelArgument = None,
    random: Random = None,
    layers: Annotated[int | None, typer.Option(help="With --random: only this many layers.")] = None,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="With --random: large channels, as trained models have them.")
    ] = False,
    dtypes: Annotated[str, typer.Option(help="Compute dtypes, joined by commas.")] = "float32,float64",
    against: Against = "transformers",
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Also compare the residual after each layer.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Also measure our 8-bit form.")] = False,
    scales: ScalesOption = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file with the errors of all.")] = None,
    subfolder: Subfolder = "",
    as_json: Json = False,
) -> None:
    """Measure the difference from transformers in float64, in quantiles; exit status 1 if a tolerance is exceeded."""
    import torch

    from nai_t5_core import parity_report
    from nai_t5_core.examine import examine
    from nai_t5_core.load import choose_scales
    from nai_t5_core.parity import measure_parity
    from nai_t5_core.peers import hf_state, random_state
    from nai_t5_core.scales_file import read_scales

    if random is not None:
        config = named_config(random).encoder_only()
        config = config.model_copy(update={"num_layers": layers}) if layers else config
        state, chosen = random_state(config, outliers=outliers), read_scales(scales) if scales else None
    else:
        examination = examine(model, subfolder)
        examination.refuse_faults()
        config, state = examination.config.encoder_only(), hf_state(examination)
        chosen = choose_scales(examination, torch.float16, scales or "auto")
    with err.status("measuring") as status:
        report = measure_parity(
            config,
            state,
            dtypes.split(","),
            against.split(",") if against else (),
            scales=chosen,
            per_layer=per_layer,
            int8=int8,
            progress=status.update,
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


def bench(
    size: Annotated[str, typer.Argument(help="A published size; the weights are random.")] = "t5-v1_1-base",
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads on the CPU.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds that count.")] = 7,
    against: Against = "transformers,nai-t5",
    load: Annotated[bool, typer.Option(help="Also measure cold start and memory while loading.")] = True,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables as Markdown.")] = None,
    as_json: Json = False,
) -> None:
    """Time the encoder beside its peers: the same weights, one process, taking turns."""
    from nai_t5_core import bench as timing

    with err.status("preparing") as status:
        report = timing.run_bench(
            size,
            dtype.value,
            threads,
            repeats,
            tuple(against.split(",")) if against else (),
            with_load=load,
            device=device,
            progress=status.update,
        )
    if markdown is not None:
        markdown.write_text(timing.markdown(report), encoding="utf-8")
    if as_json:
        print_json(report.to_dict())
        return
    out.print(timing.render(report))
    if markdown is not None:
        say(f"wrote {markdown}")
