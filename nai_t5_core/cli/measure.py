"""``parity`` and ``bench``: our encoder beside others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nai_t5_core.cli.options import DeviceOption, Dtype, DtypeOption, Json, ModelArgument, Subfolder
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
    dtypes: Annotated[str, typer.Option(help="Compute dtypes, joined by commas.")] = "float32,float64",
    against: Against = "transformers",
    subfolder: Subfolder = "",
    as_json: Json = False,
) -> None:
    """Measure the difference from transformers in float64, in quantiles; exit status 1 if a tolerance is exceeded."""
    import torch

    from nai_t5_core import parity as measuring
    from nai_t5_core.examine import examine
    from nai_t5_core.load import choose_scales
    from nai_t5_core.peers import hf_state, random_state

    if random is not None:
        config = named_config(random).encoder_only()
        config = config.model_copy(update={"num_layers": layers}) if layers else config
        state, scales = random_state(config), None
    else:
        examination = examine(model, subfolder)
        examination.refuse_faults()
        config, state = examination.config.encoder_only(), hf_state(examination)
        scales = choose_scales(examination, torch.float16)
    with err.status("measuring") as status:
        report = measuring.measure_parity(
            config,
            state,
            dtypes.split(","),
            against.split(",") if against else (),
            scales=scales,
            progress=status.update,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        out.print(measuring.render(report))
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
