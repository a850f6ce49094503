"""``inspect``, ``convert``, ``calibrate`` and ``stress``: the commands for weight files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from nai_t5_core.cli.options import (
    Dtype,
    EncoderOnly,
    Json,
    ModelArgument,
    SaveScales,
    ScalesOption,
    Subfolder,
    TokenizerOption,
)
from nai_t5_core.cli.terminal import bytes_bar, counting, out, print_json, read_prompts, say, size, working

if TYPE_CHECKING:
    from nai_t5_core.backends.quantised.packing import PackedKind
    from nai_t5_core.weights.examine import Examination


def inspect(model: ModelArgument = None, subfolder: Subfolder = "", as_json: Json = False) -> None:
    """Say what a checkpoint is: kind, sizes, dtypes, format, memory needed, and its faults (exit status 1)."""
    from nai_t5_core.weights.examine import examine

    report = _inspection(examine(model, subfolder))
    if as_json:
        print_json(report)
    else:
        _print_inspection(report)
    if report["faults"]:
        raise typer.Exit(1)


def _print_inspection(report: dict[str, Any]) -> None:
    from nai_t5_core.weights.load_report import by_reason

    table = Table(show_header=False, title=report["source"], title_justify="left")
    for key, value in report.items():
        if key not in ("source", "faults", "ignored"):
            table.add_row(key.replace("_", " "), _cell(value))
    out.print(table)
    for reason, names in by_reason(report["ignored"]).items():
        more = f" and {len(names) - 1} more" if names[1:] else ""
        say(f"ignored {names[0]}{more}: {reason}")
    for fault in report["faults"]:
        say(fault, title="fault", style="red")


def convert(
    source: Annotated[str, typer.Argument(help="Hub id, folder or file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights; auto keeps the source's.")] = Dtype.auto,
    quantize: Annotated[
        str | None, typer.Option(metavar="KIND", help="Quantise the weights: int8, q8_0, q4_k or float8.")
    ] = None,
    encoder_only: EncoderOnly = False,
    scales: ScalesOption = None,
    subfolder: Subfolder = "",
    tokenizer: TokenizerOption = None,
    as_json: Json = False,
) -> None:
    """Write one file with config and tokenizer, which loads in an instant: fused tensors, or quantised ones."""
    from nai_t5_core.weights.convert import convert as convert_checkpoint
    from nai_t5_core.weights.convert_quantised import convert_quantised

    if quantize is not None and (dtype is not Dtype.auto or scales is not None):
        raise ValueError("--quantize goes without --dtype and --scales: both are for weights that are not quantised")
    with bytes_bar(f"converting to {target}") as progress:
        if quantize is not None:
            kind: PackedKind = quantize  # type: ignore[assignment]  # checked by the function
            done = convert_quantised(source, target, kind, encoder_only, subfolder, tokenizer, progress)
        else:
            done = convert_checkpoint(
                source, target, dtype.value, encoder_only, subfolder, tokenizer, scales or "auto", progress
            )
    report = {
        "out": str(done.out),
        "dtype": str(done.dtype).removeprefix("torch."),
        "tensors": done.tensors,
        "bytes": done.nbytes,
        "tokenizer": done.tokenizer,
        "source_sha256": done.source_sha256,
    }
    if as_json:
        print_json(report)
        return
    say(f"{done.out}: {done.tensors} tensors, {size(done.nbytes)}, {report['dtype']}")
    say(f"tokenizer: {done.tokenizer or 'none found; give one with --tokenizer'}")


def calibrate(
    model: ModelArgument = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt per line; else a built-in set.")] = None,
    headroom: Annotated[float, typer.Option(help="How many times larger than seen a value may become.")] = 4.0,
    write: Annotated[Path | None, typer.Option("--out", help="Converted float16 checkpoint with the scales.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file with the maxima of every layer.")] = None,
    save_scales: SaveScales = None,
    encoder_only: EncoderOnly = False,
    subfolder: Subfolder = "",
    tokenizer: TokenizerOption = None,
    as_json: Json = False,
) -> None:
    """Find the scales that keep float16 from overflowing, one layer in memory at a time."""
    from nai_t5_core.weights import calibrate as calibrating
    from nai_t5_core.weights import calibration_report
    from nai_t5_core.weights.convert import convert as convert_checkpoint
    from nai_t5_core.weights.scales_file import write_scales

    texts = read_prompts(prompts) if prompts else calibrating.PROMPTS
    with counting("calibrating layers") as progress:
        found = calibrating.calibrate(model, texts, headroom, subfolder, tokenizer, progress, encoder_only)
    report = found.to_dict()
    if plot is not None:
        calibration_report.plot(found, plot)
        report["plot"] = str(plot)
    if save_scales is not None:
        write_scales(save_scales, found.scales, found.decoder_scales)
        report["scales"] = str(save_scales)
    if write is not None:
        with bytes_bar(f"converting to {write}") as progress:
            convert_checkpoint(
                model,
                write,
                "float16",
                encoder_only,
                subfolder,
                tokenizer,
                found.scales,
                progress,
                found.decoder_scales or "auto",
            )
        report["out"] = str(write)
    if as_json:
        print_json(report)
        return
    out.print(calibration_report.render(found))
    for name in ("plot", "scales", "out"):
        if name in report:
            say(f"wrote {report[name]}")


def stress(
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    size: Annotated[str, typer.Option(help="A published size.")] = "t5-v1_1-small",
    outlier: Annotated[str, typer.Option(help="What overflows, such as hidden; a wrong one lists all.")] = "hidden",
    layer: Annotated[int, typer.Option(help="Where.")] = 1,
    decoder: Annotated[bool, typer.Option("--decoder", help="A whole model, whose decoder overflows.")] = False,
    as_json: Json = False,
) -> None:
    """Write a random model that overflows plain float16, as trained ones do, to try the other commands with."""
    from nai_t5_core.bench.stress import Outlier, write_stress_checkpoint
    from nai_t5_core.facts.config import named_config

    kind: Outlier = outlier  # type: ignore[assignment]  # checked by the function
    with working(f"writing {folder}"):
        config = named_config(size) if decoder else named_config(size).encoder_only()
        write_stress_checkpoint(folder, config, kind, layer, stack="decoder" if decoder else "encoder")
    if as_json:
        print_json({"out": str(folder), "size": size, "outlier": outlier, "layer": layer, "decoder": decoder})
    else:
        where = f"{'decoder ' if decoder else ''}layer {layer}"
        say(f"wrote {folder}: {size}, {outlier} overflows float16 in {where}")


def _inspection(examination: Examination) -> dict[str, Any]:
    import torch

    from nai_t5_core.backends.choose import automatic_attention
    from nai_t5_core.facts.config import decoder_tensors, encoder_tensors
    from nai_t5_core.weights.examine import decoder_faults, find_tokenizer

    config, checkpoint = examination.config, examination.checkpoint
    encoder = sum(torch.Size(shape).numel() for shape in encoder_tensors(config).values())
    decoder = sum(torch.Size(shape).numel() for shape in decoder_tensors(config).values())
    try:
        tokenizer = find_tokenizer(examination)
        vocabulary = f"{tokenizer.kind}, {tokenizer.vocab_size} tokens" if tokenizer else "none"
    except ValueError as error:
        vocabulary = f"unreadable: {error}"
    return {
        "source": checkpoint.source,
        "format": "nai-t5, fused" if examination.is_native else checkpoint.format,
        "kind": config.kind,
        "size": config.size_name or "not a published size",
        "prefix": examination.keymap.prefix or "none",
        "sizes_from": examination.config_source,
        "config": config.model_dump(),
        "dtypes": {str(dtype).removeprefix("torch."): number for dtype, number in examination.dtypes.items()},
        "encoder_parameters": encoder,
        "decoder_parameters": decoder,
        "tokenizer": vocabulary,
        "encoder_memory": {
            **({"as it lies": size(examination.encoder_bytes)} if examination.quantised else {}),
            **{name: size(encoder * width) for name, width in (("float32", 4), ("bfloat16/float16", 2))},
        },
        "attention": automatic_attention(),
        "ignored": examination.keymap.ignored,
        "faults": [*examination.faults, *decoder_faults(examination)],
    }


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {item:,}" if type(item) is int else f"{key}: {item}" for key, item in value.items())
    return f"{value:,}" if type(value) is int else str(value)
