"""Our nodes beside ComfyUI's own T5 behind the loader of the pack ComfyUI-GGUF, on the same file; prints Markdown.

    COMFYUI_PATH=… COMFYUI_GGUF_PATH=… PYTHONPATH=.:tests:tests/comfyui python tests/comfyui/gguf_pack.py

The pack's reader, modules and patcher are its own. Only the choice of classes is not: ComfyUI knows a T5 by the sizes
of XXL, and here it is of any size.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_toys import conditioning, require_comfyui
from memory import resident
from torch import Tensor

from nai_t5_core.bench.gguf_files import write_gguf
from nai_t5_core.bench.peers import random_state
from nai_t5_core.facts.config import T5Config, named_config

PROMPT = "an oil painting of a crowded market in autumn: a woman in a green coat sells pears and plums from a cart"
QUANTILES = (0.5, 0.99, 1.0)
STOCK = "ComfyUI behind ComfyUI-GGUF"


def require_pack() -> Any:
    """The pack as a module; skips the calling test file where there is none."""
    path = os.environ.get("COMFYUI_GGUF_PATH")
    if not path:
        pytest.skip(
            "COMFYUI_GGUF_PATH is not set: give a checkout of ComfyUI-GGUF to run these", allow_module_level=True
        )
    if "gguf_pack_of_others" not in sys.modules:
        place = Path(path) / "__init__.py"
        found = importlib.util.spec_from_file_location("gguf_pack_of_others", place, submodule_search_locations=[path])
        assert found is not None and found.loader is not None
        module = sys.modules["gguf_pack_of_others"] = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    return importlib.import_module("gguf_pack_of_others.nodes")


def by_pack(nodes: Any, path: Path, config: T5Config) -> Any:
    """ComfyUI's CLIP of a GGUF file for Mochi, as the pack's CLIPLoader builds it."""
    import comfy.model_management
    import comfy.sd
    from comfy.text_encoders import genmo

    from comfy_nai_t5.families import server_config

    (state,) = nodes.CLIPLoaderGGUF().load_data([str(path)])
    target = type("Target", (), {"params": {}, "clip": genmo.mochi_te(), "tokenizer": genmo.MochiT5Tokenizer})
    options = {
        "custom_operations": nodes.GGMLOps,
        "initial_device": comfy.model_management.text_encoder_offload_device(),
        "t5xxl_model_config": server_config(config),
    }
    if "state_dict" in inspect.signature(comfy.sd.CLIP.__init__).parameters:
        clip = comfy.sd.CLIP(target, state_dict=[state], model_options=options)
    else:
        clip = comfy.sd.CLIP(target, model_options=options)
        clip.load_sd(state)
    clip.patcher = nodes.GGUFModelPatcher.clone(clip.patcher)
    return clip


def differences(found: Tensor, meant: Tensor) -> list[float]:
    """Quantiles of the differences, relative to the largest value."""
    off = (found.double() - meant.double()).abs().flatten().sort().values / meant.double().abs().max()
    return [float(off[min(len(off) - 1, int(quantile * len(off)))]) for quantile in QUANTILES]


def ways(nodes: Any, path: Path, config: T5Config) -> dict[str, Callable[[], Any]]:
    """How a CLIP of a file is got, by what it is called."""
    from comfy_nai_t5 import families, loaders
    from comfy_nai_t5.choices import Settings
    from comfy_nai_t5.clip import with_our_t5

    families.FAMILIES["mochi"] = replace(families.FAMILIES["mochi"], checkpoint=None)
    return {
        STOCK: lambda: by_pack(nodes, path, config),
        "Replace T5, behind the same": lambda: with_our_t5(by_pack(nodes, path, config), Settings()),
        "Load T5": lambda: loaders.load_t5(path, "mochi", Settings()),
        "Load T5, float32": lambda: loaders.load_t5(path, "mochi", Settings("float32")),
        "Load T5, unpacked": lambda: loaders.load_t5(path, "mochi", Settings(weights="unpack")),
    }


def _own(tokenizer: Any) -> Any:
    """The T5's, in one that may hold those of several encoders."""
    return getattr(tokenizer, tokenizer.clip)


def conditioned(clip: Any, rows: int) -> Tensor:
    """The embeddings of the prompt, padded to so many rows; of the words that fit, if each has up to three tokens."""
    _own(clip.tokenizer).min_length = rows
    found: Tensor = conditioning(clip, " ".join(PROMPT.split()[: rows // 3]))["cond"]
    assert found.shape[1] == rows
    return found


@torch.inference_mode()
def compare(nodes: Any, config: T5Config, kind: str, rounds: int, counts: list[int]) -> None:
    """Prints a table of one kind: all implementations take turns. Memory and differences are those of the first count
    of rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_gguf(Path(folder) / f"{kind}.gguf", config, random_state(config), kind)
        size = path.stat().st_size
        clips, grown = {}, {}
        for name, build in ways(nodes, path, config).items():
            conditioned(build(), counts[0])  # all that is made once
            before = resident()
            clips[name] = build()
            conditioned(clips[name], counts[0])
            grown[name] = resident() - before
        found, times = {}, {}
        for rows in counts:
            taken: dict[str, list[float]] = {name: [] for name in clips}
            for _ in range(rounds):
                for name, clip in clips.items():
                    began = time.perf_counter()
                    found[name, rows] = conditioned(clip, rows)
                    taken[name].append(1e3 * (time.perf_counter() - began))
            times |= {(name, rows): statistics.median(taken[name]) for name in clips}
    meant = found[STOCK, counts[0]]
    quantiles = [f"{quantile:g}" if quantile < 1 else "largest" for quantile in QUANTILES]
    head = [f"{kind}, {size / 1e6:.0f} MB", *(f"{rows} rows" for rows in counts), "memory", *quantiles]
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name in clips:
        took = [f"{times[name, rows]:.0f} ms" for rows in counts]
        off = [] if name == STOCK else [f"{each:.1e}" for each in differences(found[name, counts[0]], meant)]
        cells = [name, *took, f"{grown[name] / size:.2f} × the file", *(off or [""] * len(QUANTILES))]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="t5-v1_1-large")
    parser.add_argument("--layers", type=int, help="fewer layers than the size has")
    parser.add_argument("--kinds", nargs="+", default=["Q8_0", "Q4_K"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", nargs="+", type=int, default=[256, 32], help="of the padded prompt; Mochi has 256")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    config = named_config(chosen.size).encoder_only()
    if chosen.layers is not None:
        config = config.model_copy(update={"num_layers": chosen.layers})
    for kind in chosen.kinds:
        compare(require_pack(), config, kind, chosen.rounds, chosen.rows)


if __name__ == "__main__":
    require_comfyui()
    main()
