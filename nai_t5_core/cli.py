"""The command ``nai-t5``. Every command takes ``--json`` for one machine-readable object on stdout.

torch is imported by the commands and not by this module, so that ``nai-t5 --help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from nai_t5_core.load import Examination
    from nai_t5_core.packing import PaddingPolicy
    from nai_t5_core.text_encoder import PromptEmbeddings, TextEncoder

app = typer.Typer(
    help="A fast and exact T5 text encoder. Without --model, commands use a tiny embedded model and need no download.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)


class Dtype(str, Enum):
    """Names of compute dtypes, and the choice by device."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Padding(str, Enum):
    """Padding policies; see nai_t5_core.packing."""

    attend = "attend"
    exact = "exact"
    skip = "skip"
    trim = "trim"


Prompts = Annotated[list[str] | None, typer.Argument(help="One or more prompts.")]
PromptFile = Annotated[Path | None, typer.Option("--file", help="Text file with one prompt per line.")]
ModelArgument = Annotated[str | None, typer.Argument(help="Hub id, folder or file; the embedded model by default.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Hub id, folder or file; the embedded one by default.")
]
Subfolder = Annotated[str, typer.Option(help="The text encoder's folder in a diffusers pipeline.")]
TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", help="Tokenizer file or folder, if the model has none.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Compute dtype.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps…")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def encode(
    prompts: Prompts = None,
    file: PromptFile = None,
    model: ModelOption = None,
    family: Annotated[str | None, typer.Option(help="Diffusion model family: gives length and padding.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Cut prompts to this many tokens.")] = None,
    padding: Annotated[Padding | None, typer.Option(help="What is done with pad tokens.")] = None,
    truncate: Annotated[bool, typer.Option(help="Cut prompts that are too long, or refuse them.")] = True,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    subfolder: Subfolder = "",
    tokenizer: TokenizerOption = None,
    write: Annotated[Path | None, typer.Option("--out", help="Safetensors file to write.")] = None,
    as_json: Json = False,
) -> None:
    """Encode prompts: prints a summary of the embeddings and writes them to a file."""
    texts = _texts(prompts, file)
    with _working("loading the model"):
        from nai_t5_core.text_encoder import TextEncoder

        encoder = TextEncoder.from_pretrained(model, dtype.value, device, tokenizer=tokenizer, subfolder=subfolder)
    policy: PaddingPolicy | None = padding.value if padding else None
    with _working(f"encoding {len(texts)} prompts"):
        embeddings = encoder.encode(
            texts, family, max_length=max_length, padding=policy, truncate=truncate, output_device="cpu"
        )
    summary = _embedding_summary(encoder, texts, embeddings)
    if write is not None:
        _write_embeddings(write, embeddings, texts, encoder, family)
        summary["out"] = str(write)
    if as_json:
        _print_json(summary)
    else:
        _print_embeddings(summary)


@app.command()
def count(
    prompts: Prompts = None,
    file: PromptFile = None,
    model: ModelOption = None,
    family: Annotated[
        str | None, typer.Option(help="Diffusion model family: gives the limit and text cleaning.")
    ] = None,
    subfolder: Subfolder = "",
    tokenizer: TokenizerOption = None,
    as_json: Json = False,
) -> None:
    """Count tokens, the end token included, and show what a family's limit would cut off."""
    texts = _texts(prompts, file)
    from nai_t5_core.families import family as family_named
    from nai_t5_core.load import find_tokenizer_for
    from nai_t5_core.text_cleaning import clean_text

    row = family_named(family) if family else None
    cleaned = [clean_text(text, row.text_cleaning) for text in texts] if row else texts
    batch = find_tokenizer_for(model, subfolder, tokenizer)(cleaned, row.max_length if row else None, pad_to=None)
    rows = [
        {"prompt": text, "tokens": tokens, "cut_text": cut}
        for text, tokens, cut in zip(texts, batch.full_counts, batch.cut_text, strict=True)
    ]
    if as_json:
        _print_json({"limit": row.max_length if row else None, "prompts": rows})
        return
    table = Table("prompt", "tokens", *(["cut off"] if row else []), title=f"limit {row.max_length}" if row else None)
    for item in rows:
        cells = [_short(item["prompt"]), str(item["tokens"])]
        table.add_row(*cells, *([_short(item["cut_text"])] if row else []))
    out.print(table)


@app.command()
def inspect(model: ModelArgument = None, subfolder: Subfolder = "", as_json: Json = False) -> None:
    """Say what a checkpoint is: kind, sizes, dtypes, format, what is missing, and the memory it needs."""
    from nai_t5_core.load import by_reason, examine

    examination = examine(model, subfolder)
    report = _inspection(examination)
    if as_json:
        _print_json(report)
        return
    table = Table(show_header=False, title=report["source"], title_justify="left")
    for key, value in report.items():
        if key not in ("source", "faults", "ignored"):
            table.add_row(key.replace("_", " "), _cell(value))
    out.print(table)
    for reason, names in by_reason(report["ignored"]).items():
        more = f" and {len(names) - 1} more" if names[1:] else ""
        out.print(f"ignored [bold]{names[0]}[/bold]{more}: {reason}", highlight=False)
    for fault in report["faults"]:
        out.print(f"[red]fault[/red] {fault}", highlight=False)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Hub id, folder or file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights; auto keeps the source's.")] = Dtype.auto,
    encoder_only: Annotated[bool, typer.Option("--encoder-only", help="Leave the decoder out.")] = False,
    subfolder: Subfolder = "",
    tokenizer: TokenizerOption = None,
    as_json: Json = False,
) -> None:
    """Write one file with fused tensors, config and tokenizer, which loads in an instant."""
    from nai_t5_core.convert import convert as convert_checkpoint

    with _bytes_bar(f"converting to {target}") as progress:
        done = convert_checkpoint(source, target, dtype.value, encoder_only, subfolder, tokenizer, progress)
    report = {
        "out": str(done.out),
        "dtype": str(done.dtype).removeprefix("torch."),
        "tensors": done.tensors,
        "bytes": done.nbytes,
        "tokenizer": done.tokenizer,
        "source_sha256": done.source_sha256,
    }
    if as_json:
        _print_json(report)
        return
    out.print(f"{done.out}: {done.tensors} tensors, {_size(done.nbytes)}, {report['dtype']}", highlight=False)
    out.print(f"tokenizer: {done.tokenizer or 'none found; give one with --tokenizer'}", highlight=False)


# ---------------------------------------------------------------------------------------------------------------------
# What the commands share
# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """The entry point: faults of the input become one line on stderr and exit status 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        err.print(f"[red]error:[/red] {_plain(str(error))}", highlight=False)
        sys.exit(2)


def _texts(prompts: list[str] | None, file: Path | None) -> list[str]:
    texts = list(prompts or [])
    if file is not None:
        try:
            texts += file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} cannot be read as UTF-8 text: {error}") from error
    if not texts:
        raise ValueError("no prompts; give one or more in quotes, or --file with one per line")
    return texts


def _embedding_summary(encoder: TextEncoder, texts: list[str], embeddings: PromptEmbeddings) -> dict[str, Any]:
    limit = embeddings.attention_mask.shape[1]
    prompts = []
    for index, (text, states) in enumerate(zip(texts, embeddings.unpadded(), strict=True)):
        values = states.float()
        prompts.append(
            {
                "prompt": text,
                "tokens": embeddings.token_counts[index],
                "truncated": embeddings.truncated[index],
                "cut_text": embeddings.cut_text[index],
                "mean": values.mean().item(),
                "std": values.std(correction=0).item(),
                "first_values": values[0, :4].tolist(),
            }
        )
    return {
        "model": repr(encoder),
        "source": encoder.report.source if encoder.report else None,
        "shape": list(embeddings.hidden_states.shape),
        "dtype": str(embeddings.hidden_states.dtype).removeprefix("torch."),
        "length": limit,
        "prompts": prompts,
    }


def _print_embeddings(summary: dict[str, Any]) -> None:
    out.print(f"{_plain(summary['model'])} → {summary['dtype']} {_plain(str(summary['shape']))}", highlight=False)
    table = Table("prompt", "tokens", "mean", "std", "first values")
    for row in summary["prompts"]:
        first = " ".join(f"{value:+.3f}" for value in row["first_values"])
        table.add_row(_short(row["prompt"]), str(row["tokens"]), f"{row['mean']:+.4f}", f"{row['std']:.4f}", first)
    out.print(table)
    for row in summary["prompts"]:
        if row["truncated"]:
            lost = f"{_short(row['prompt'])}; lost: {_short(row['cut_text'])}"
            err.print(f"[yellow]cut to {row['tokens']} tokens:[/yellow] {lost}", highlight=False)
    if "out" in summary:
        out.print(f"wrote {summary['out']}", highlight=False)


def _write_embeddings(
    path: Path, embeddings: PromptEmbeddings, texts: list[str], encoder: TextEncoder, family: str | None
) -> None:
    from nai_t5_core.formats import write_safetensors

    tensors = {
        "hidden_states": embeddings.hidden_states.contiguous(),
        "attention_mask": embeddings.attention_mask.contiguous(),
    }
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    metadata = {"prompts": json.dumps(texts), "model": repr(encoder), "family": family or ""}
    write_safetensors(path, layout, tensors.items(), metadata)


def _inspection(examination: Examination) -> dict[str, Any]:
    import torch

    from nai_t5_core.config import decoder_tensors, encoder_tensors
    from nai_t5_core.load import decoder_faults, find_tokenizer

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
        "encoder_memory": {name: _size(encoder * width) for name, width in (("float32", 4), ("bfloat16/float16", 2))},
        "ignored": examination.keymap.ignored,
        "faults": [*examination.faults, *decoder_faults(examination)],
    }


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {item:,}" if type(item) is int else f"{key}: {item}" for key, item in value.items())
    return f"{value:,}" if type(value) is int else _plain(str(value))


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _short(text: object, width: int = 60) -> str:
    flat = " ".join(str(text).split())
    return _plain(flat if len(flat) <= width else flat[: width - 1] + "…")


def _plain(text: str) -> str:
    """Text that is no rich markup."""
    return text.replace("[", r"\[")


def _print_json(report: dict[str, Any]) -> None:
    # Not through rich, which would wrap long lines.
    print(json.dumps(report, ensure_ascii=False))


@contextmanager
def _working(what: str) -> Iterator[None]:
    """A spinner on stderr, so that stdout holds results only."""
    with err.status(what):
        yield


@contextmanager
def _bytes_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=err, transient=True
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
