"""A checkpoint of zeros in a file with holes: it takes no room on a disk, and is read as any other."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import torch

from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import published_scales
from nai_t5_core.weights import native
from nai_t5_core.weights.formats import tensor_bytes
from nai_t5_core.weights.fuse import fused_recipes
from nai_t5_core.weights.safetensors_files import DTYPE_NAMES


def write_hollow(path: Path, config: T5Config, dtype: torch.dtype) -> Path:
    """Writes an encoder as ``nai-t5 convert`` lays it out; weights of norms are ones. Gives back the path."""
    scales = published_scales(config) if dtype == torch.float16 else None
    recipes, header, ends = fused_recipes(config, scales), dict[str, object](), [0]
    header["__metadata__"] = native.header(config, path.name, "", scales)
    for recipe in recipes:
        own = recipe.dtype(dtype)
        ends.append(ends[-1] + own.itemsize * math.prod(recipe.shape))
        header[recipe.target] = {"dtype": DTYPE_NAMES[own], "shape": list(recipe.shape), "data_offsets": ends[-2:]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        begin = file.tell()
        file.truncate(begin + ends[-1])
        for recipe, start in zip(recipes, ends, strict=False):
            if "layer_norm" in recipe.target:
                file.seek(begin + start)
                file.write(tensor_bytes(torch.ones(recipe.shape, dtype=recipe.dtype(dtype))))
    return path
