"""``encode``, ``count`` and ``warm-up``: the commands for prompts."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from nai_t5_core.cli.options import (
    Attention,
    Cache,
    CacheDir,
    DeviceOption,
    Dtype,
    DtypeOption,
    Json,
    LoraOption,
    ModelArgument,
    ModelOption,
    Padding,
    Products,
    ProductsOption,
    PromptFile,
    Prompts,
    SaveScales,
    ScalesOption,
    Subfolder,
    TokenizerOption,
    Unpack,
)
from nai_t5_core.cli.terminal import all_prompts, counting, err, not_collecting, out, print_json, say, short, working

if TYPE_CHECKING:
    from nai_t5_core.facts.padding import PaddingPolicy
    from nai_t5_core.lora.files import Lora
    from nai_t5_core.prompts.text_encoder import PromptEmbeddings, TextEncoder


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
    attention: Annotated[Attention, typer.Option(help="How attention is computed.")] = Attention.auto,
    int8: Annotated[bool, typer.Option("--int8", help="Have the projections' weights in 8 bits.")] = False,
    offload: Annotated[
        bool, typer.Option("--offload", help="Leave the layers in the host's memory: for a GPU with too little.")
    ] = False,
    products: ProductsOption = Products.auto,
    compile_it: Annotated[bool, typer.Option("--compile", help="Compile the encoder; see warm-up.")] = False,
    subfolder: Subfolder = "",
    tokenizer: TokenizerOption = None,
    scales: ScalesOption = None,
    save_scales: SaveScales = None,
    lora: LoraOption = None,
    cache: Cache = False,
    cache_dir: CacheDir = None,
    unpack: Unpack = False,
    write: Annotated[Path | None, typer.Option("--out", help="Safetensors file to write.")] = None,
    as_json: Json = False,
) -> None:
    """Encode prompts: prints a summary of the embeddings and writes them to a file."""
    texts = all_prompts(prompts, file)
    with working("loading the model"), not_collecting():
        from nai_t5_core.prompts.cache.store import open_store
        from nai_t5_core.prompts.text_encoder import TextEncoder

        loras = _loras(lora) if lora else []
        store = open_store(cache_dir or cache) if cache_dir or cache else None
        encoder = TextEncoder.from_pretrained(
            model,
            dtype.value,
            device,
            tokenizer=tokenizer,
            subfolder=subfolder,
            scales=scales or "auto",
            attention=attention.value,
            quantize="int8" if int8 else None,
            compile=compile_it,
            loras=loras,
            products=products.value,
            cache=store or False,
            unpack=unpack,
            offload=offload,
        )
    policy: PaddingPolicy | None = padding.value if padding else None
    with working(f"encoding {len(texts)} prompts"):
        embeddings = encoder.encode(
            texts, family, max_length=max_length, padding=policy, truncate=truncate, output_device="cpu"
        )
    if store is not None:
        store.wait()
    summary = _embedding_summary(encoder, texts, embeddings)
    if loras:
        summary["loras"] = _lora_summary(loras)
    if write is not None:
        _write_embeddings(write, embeddings, texts, encoder, family)
        summary["out"] = str(write)
    if save_scales is not None:
        encoder.save_scales(save_scales)
        summary["scales"] = str(save_scales)
    if as_json:
        print_json(summary)
    else:
        _print_embeddings(summary)


def warm_up(
    model: ModelArgument = None,
    up_to: Annotated[int, typer.Option(help="Tokens of the largest batch to come.")] = 512,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    subfolder: Subfolder = "",
    as_json: Json = False,
) -> None:
    """Compile the encoder ahead; torch keeps the kernels on disk, so that later processes start faster."""
    from nai_t5_core.backends.compiled import compile_stack
    from nai_t5_core.backends.compiled import warm_up as compile_buckets
    from nai_t5_core.weights.load import load_encoder

    with working("loading the model"):
        stack = compile_stack(load_encoder(model, dtype.value, device, subfolder=subfolder, unpack=True))
    with counting("compiling buckets") as progress:
        ready = compile_buckets(stack, up_to, progress)
    if as_json:
        print_json({"model": repr(stack), "buckets": ready})
    else:
        say(f"compiled for up to {', '.join(map(str, ready))} tokens")


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
    texts = all_prompts(prompts, file)
    from nai_t5_core.facts.families import family as family_named
    from nai_t5_core.facts.text_cleaning import clean_text
    from nai_t5_core.weights.examine import find_tokenizer_for

    row = family_named(family) if family else None
    limit = (row.call_length or row.max_length) if row else None
    cleaned = [clean_text(text, row.text_cleaning) for text in texts] if row else texts
    batch = find_tokenizer_for(model, subfolder, tokenizer)(cleaned, limit, pad_to=None)
    rows = [
        {"prompt": text, "tokens": tokens, "cut_text": cut}
        for text, tokens, cut in zip(texts, batch.full_counts, batch.cut_text, strict=True)
    ]
    if as_json:
        print_json({"limit": limit, "prompts": rows})
        return
    table = Table("prompt", "tokens", *(["cut off"] if row else []), title=f"limit {limit}" if row else None)
    for item in rows:
        cells = [short(item["prompt"]), str(item["tokens"])]
        table.add_row(*cells, *([short(item["cut_text"])] if row else []))
    out.print(table)


def path_and_strength(text: str) -> tuple[str, float]:
    """The parts of ``FILE[:STRENGTH]``; a path may have colons of its own."""
    path, colon, number = text.rpartition(":")
    with suppress(ValueError):
        if colon:
            return path, float(number)
    return text, 1.0


def _loras(given: list[str]) -> list[tuple[Lora, float]]:
    from nai_t5_core.lora.files import read_lora

    return [(read_lora(path), strength) for path, strength in map(path_and_strength, given)]


def _lora_summary(loras: list[tuple[Lora, float]]) -> list[dict[str, Any]]:
    from nai_t5_core.lora.files import counted

    return [
        {
            "name": lora.name,
            "strength": strength,
            "weights": len(lora.changes),
            "not_for_t5": counted(lora.other_parts()),
        }
        for lora, strength in loras
    ]


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
        "source": encoder.source,
        "shape": list(embeddings.hidden_states.shape),
        "dtype": str(embeddings.hidden_states.dtype).removeprefix("torch."),
        "loaded": encoder.is_loaded,
        "length": limit,
        "prompts": prompts,
    }


def _print_embeddings(summary: dict[str, Any]) -> None:
    say(f"{summary['model']} gives {summary['dtype']} {summary['shape']}")
    table = Table("prompt", "tokens", "mean", "std", "first values")
    for row in summary["prompts"]:
        first = " ".join(f"{value:+.3f}" for value in row["first_values"])
        table.add_row(short(row["prompt"]), str(row["tokens"]), f"{row['mean']:+.4f}", f"{row['std']:.4f}", first)
    out.print(table)
    for row in summary.get("loras", []):
        others = f"; not for the T5: {row['not_for_t5']}" if row["not_for_t5"] else ""
        say(f"LoRA {row['name']} at {row['strength']:g}: {row['weights']} weights{others}")
    for row in summary["prompts"]:
        if row["truncated"]:
            lost = f"{short(row['prompt'])}; lost: {short(row['cut_text'])}"
            say(lost, err, f"cut to {row['tokens']} tokens:", "yellow")
    for name in ("out", "scales"):
        if name in summary:
            say(f"wrote {summary[name]}")


def _write_embeddings(
    path: Path, embeddings: PromptEmbeddings, texts: list[str], encoder: TextEncoder, family: str | None
) -> None:
    from nai_t5_core.weights.formats import write_safetensors

    tensors = {
        "hidden_states": embeddings.hidden_states.contiguous(),
        "attention_mask": embeddings.attention_mask.contiguous(),
    }
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    metadata = {"prompts": json.dumps(texts), "model": repr(encoder), "family": family or ""}
    write_safetensors(path, layout, tensors.items(), metadata)
