"""Inputs that several nodes have, and their schemas on servers of different age."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import folder_paths
import torch
from comfy.model_management import get_torch_device
from comfy_api.latest import io

from comfy_nai_t5.choices import ATTENTIONS, CACHES, DTYPES, LAYOUTS, WEIGHTS

CATEGORY = "text encoders/T5"
EMBEDDED = "embedded tiny model (to try the nodes with)"
_GGUF = ".gguf"

_TIPS = {
    "dtype": "What is computed in. auto: float16 on a GPU; on a CPU bfloat16 where it is fast, else float32. float16 "
    "is kept in range by scales, and nothing is clipped. ComfyUI's own T5 computes in float32.",
    "weights": "How the weights are kept in memory. auto: as computed in, unless the file's own form is smaller or the "
    "kernels read it. file: as they are in the file. float8: half the memory of float16; each layer is cast as it is "
    "used. Scaled float8 files, and quantised ones (GGUF and the like), stay as they are whatever is chosen, but with "
    "unpack, which makes numbers of 16 bits of the quantised ones: more memory, faster.",
    "device": "Where the encoder runs. default: where ComfyUI puts text encoders.",
    "attention": "How attention is computed. auto: flex for long prompts on CUDA, the kernels' or SDPA elsewhere. flex "
    "needs a compiler, and is compiled when it is first used.",
    "layout": "fused: products that have the same input run as one. auto: fused layer by layer, wherever that changes "
    "nothing, LoRA included; the log says where not, and why. packed: for a T5 on the CPU, up to 1.5 times faster by a "
    "second copy of the weights, which takes as much memory again. int8: for a T5 on the CPU, faster still for some "
    "accuracy (the help page has figures), by a copy in 8 bits. separate: every product by itself.",
    "compile": "Have torch compile the encoder for each of a few prompt lengths, when it first meets one: slow once, "
    "faster afterwards. For GPUs.",
    "cache": "on: keeps embeddings in memory and on the disk, and takes them from there where model, LoRAs, words and "
    "all else are the same. A loader then reads its files at the first prompt that is not kept. memory only: until "
    "ComfyUI ends.",
}


def schema(**entries: Any) -> io.Schema:
    """A schema without the entries that an older server does not know."""
    known = {field.name for field in fields(io.Schema)}
    return io.Schema(category=CATEGORY, **{name: value for name, value in entries.items() if name in known})


def other_files() -> list[str]:
    """The text encoders that ComfyUI itself reads; other nodes may have it list GGUF files too."""
    return [name for name in folder_paths.get_filename_list("text_encoders") if not name.lower().endswith(_GGUF)]


def t5_files() -> list[str]:
    """The text encoders, and the GGUF files in the same folders, which ComfyUI itself does not list."""
    found = set(other_files())
    for folder in folder_paths.get_folder_paths("text_encoders"):
        names, _ = folder_paths.recursive_search(folder, excluded_dir_names=[".git"])
        found.update(folder_paths.filter_files_extensions(names, {_GGUF}))
    return sorted(found)


def path_of(name: str) -> str | None:
    """The path of a text encoder; None for the embedded model."""
    return None if name == EMBEDDED else str(folder_paths.get_full_path_or_raise("text_encoders", name))


def _choice(name: str, options: tuple[str, ...] | list[str], is_optional: bool = False) -> io.Combo.Input:
    return io.Combo.Input(name, options=list(options), default=options[0], optional=is_optional, tooltip=_TIPS[name])


def _devices() -> list[str]:
    """The default, the CPU, and every accelerator of the kind that ComfyUI uses."""
    kind = get_torch_device().type
    backend: Any = getattr(torch, kind, None)
    if kind == "cpu":
        found = []
    elif hasattr(backend, "device_count") and kind != "mps":
        found = [f"{kind}:{index}" for index in range(backend.device_count())]
    else:
        found = [str(get_torch_device())]
    return ["default", "cpu", *found]


def computing_inputs() -> list[Any]:
    """The settings that a loaded CLIP can still be given, after its dtype."""
    return [
        _choice("attention", ATTENTIONS, is_optional=True),
        _choice("layout", LAYOUTS, is_optional=True),
        io.Boolean.Input("compile", default=False, optional=True, tooltip=_TIPS["compile"]),
        _choice("cache", CACHES, is_optional=True),
    ]


def dtype_input() -> io.Combo.Input:
    return _choice("dtype", DTYPES)


def loading_inputs() -> list[Any]:
    """All of :class:`comfy_nai_t5.choices.Settings`."""
    return [
        dtype_input(),
        _choice("weights", WEIGHTS),
        _choice("device", _devices(), is_optional=True),
        *computing_inputs(),
    ]


def text_inputs() -> list[Any]:
    return [
        io.Clip.Input("clip", tooltip="Any CLIP with a T5."),
        io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="The prompt; (words:1.2) as usual."),
        io.Int.Input(
            "max_length",
            default=0,
            min=0,
            max=8192,
            tooltip="The most tokens for the T5, end token included; what is beyond is cut off and told. 0: no limit.",
        ),
    ]
