"""The arguments and options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nai_t5_core.facts.padding import PADDING_POLICIES


class Dtype(str, Enum):
    """Names of compute dtypes; ``auto`` chooses by device."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


# The padding policies as an Enum, which typer needs for choices.
Padding = Enum("Padding", {policy: policy for policy in PADDING_POLICIES}, type=str)  # type: ignore[misc]


class Attention(str, Enum):
    """Kinds of attention; ``auto`` chooses by device and batch, see nai_t5_core.model.attention_choice."""

    auto = "auto"
    flex = "flex"
    sdpa = "sdpa"


class Products(str, Enum):
    """What computes products on the CPU; see :func:`nai_t5_core.backends.choose.prepack`."""

    auto = "auto"
    kernels = "kernels"
    amx = "amx"
    avx512 = "avx512"
    avx2_vnni = "avx2-vnni"
    avx2 = "avx2"
    onednn = "onednn"


Prompts = Annotated[list[str] | None, typer.Argument(help="One or more prompts.")]
PromptFile = Annotated[Path | None, typer.Option("--file", help="Text file with one prompt per line.")]
ModelArgument = Annotated[str | None, typer.Argument(help="Hub id, folder or file; the embedded model by default.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Hub id, folder or file; the embedded one by default.")
]
Subfolder = Annotated[str, typer.Option(help="The text encoder's folder in a diffusers pipeline.")]
TokenizerOption = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Tokenizer file or folder, or weights with one inside, if the model has none."),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Compute dtype.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps…")]
ProductsOption = Annotated[
    Products, typer.Option("--products", help="What computes products on a CPU: an instruction set, or oneDNN.")
]
EncoderOnly = Annotated[bool, typer.Option("--encoder-only", help="Leave the decoder out.")]
ScalesOption = Annotated[Path | None, typer.Option("--scales", help="Float16 scales from a file of --save-scales.")]
SaveScales = Annotated[Path | None, typer.Option("--save-scales", help="Write the float16 scales to a JSON file.")]
LoraOption = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:STRENGTH]", help="Merge a LoRA of the T5 first; may be repeated."),
]
Cache = Annotated[bool, typer.Option("--cache", help="Keep embeddings, and load the model for new prompts only.")]
# A folder that cannot be read costs the cache, which tells it, and not the encode.
CacheDir = Annotated[Path | None, typer.Option("--cache-dir", readable=False, help="As --cache, in this folder.")]
Unpack = Annotated[
    bool, typer.Option("--unpack", help="Unpack a quantised file while it is loaded: more memory, and faster.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
