"""The memory that a quantised file takes in ComfyUI: the process's own, beyond that of a tiny model.

COMFYUI_PATH=… PYTHONPATH=.:tests:tests/comfyui python tests/comfyui/memory.py t5-v1_1-xl Q8_0
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from comfy_toys import V1_1, conditioning, require_comfyui, toy_lora

from nai_t5_core.facts.config import T5Config, named_config

PROMPT = "a photo of a cat on a red sofa"
# As fractions of the file, of what there is after each step.
Shares = dict[str, float]


def resident() -> int:
    """Bytes in memory that belong to this process, anonymous and of mapped files."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) * 1024


@torch.inference_mode()
def measure(config: T5Config, kind: str, weights: str = "auto", dtype: str = "bfloat16") -> Shares:
    """Loads a file of random weights, encodes, and encodes with a LoRA on every projection."""
    import comfy.sd

    from comfy_nai_t5 import families, loaders
    from comfy_nai_t5.choices import Settings

    families.FAMILIES["mochi"] = replace(families.FAMILIES["mochi"], checkpoint=None)
    settings = Settings(dtype, weights)
    with tempfile.TemporaryDirectory() as folder:
        tiny, file = (
            written(Path(folder) / f"{name}.safetensors", sizes, kind)
            for name, sizes in (("tiny", TINY), ("file", config))
        )
        size = file.stat().st_size
        first = loaders.load_t5(tiny, "mochi", settings)
        conditioning(first, PROMPT)
        before = resident()
        second = loaders.load_t5(tiny, "mochi", settings)
        conditioning(second, PROMPT)
        beside = resident() - before  # a tokenizer, and all else that any model takes
        before = resident()
        clip = loaders.load_t5(file, "mochi", settings)
        shares: Shares = {"size, MB": size / 1e6, "load": (resident() - before - beside) / size}
        conditioning(clip, PROMPT)
        shares["encode"] = (resident() - before - beside) / size
        t5 = clip.cond_stage_model.t5xxl.transformer
        lora = toy_lora(t5, tuple(projections_of(t5)), "t5xxl")
        patched = comfy.sd.load_lora_for_models(None, clip, lora, 0, 1.0)[1]
        added = sum(tensor.nbytes for tensor in lora.values())
        conditioning(patched, PROMPT)
        shares["LoRA"] = (resident() - before - beside - added) / size
    return shares


TINY = V1_1.model_copy(update={"d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 2})


def written(path: Path, config: T5Config, kind: str) -> Path:
    from checkpoints import write_file

    from nai_t5_core.bench.peers import random_state
    from nai_t5_core.weights.convert_quantised import convert_quantised

    source = write_file(path.with_suffix(".original.safetensors"), random_state(config, dtype=torch.bfloat16))
    convert_quantised(source, path, kind.lower())
    source.unlink()
    return path


def projections_of(t5: Any) -> list[str]:
    return [
        name for name, module in t5.named_modules() if name.endswith((".q", ".k", ".v", ".o", ".wi_0", ".wi_1", ".wo"))
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", help="a published size; the weights are random")
    parser.add_argument("kind", help="Q8_0, Q4_K, int8 or float8")
    parser.add_argument("--layers", type=int, help="fewer layers than the size has")
    parser.add_argument("--weights", default="auto", help="as the loader's input")
    chosen = parser.parse_args()
    require_comfyui()
    sizes = named_config(chosen.size).encoder_only()
    if chosen.layers is not None:
        sizes = sizes.model_copy(update={"num_layers": chosen.layers})
    print(json.dumps(measure(sizes, chosen.kind, chosen.weights)))
