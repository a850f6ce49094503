"""ComfyUI's own T5 and ours in its dynamic memory, on a card: times, what is equal, and what of the card is taken."""

from __future__ import annotations

import importlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_file
from comfy_toys import conditioning, error, stock, toy_lora
from conftest import random_state

from nai_t5_core.facts.config import T5Config

PROMPTS = {
    "short": "an oil painting of a crowded market in autumn",
    "long": "a woman in a green coat sells pears and plums from a cart beneath the lamps of the harbour, " * 6,
}
_WAYS = {"by modules": "separate", "joined": "fused"}
HEAD = ("prompt", "", "time", "times faster", "difference", "weights on the card", "beside them", "")
# Joined is to be as many times as fast as stock, at least.
TO_REACH = 2.0
_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"


@dataclass(frozen=True)
class Encoded:
    """Median seconds of an encode, its result, and the most that the card gives for it beside what it had before."""

    seconds: float
    hidden: torch.Tensor
    beside: int


def allocate_as_comfyui() -> None:
    """Starts the running program anew where torch is to take a card's memory in another way, as ComfyUI would have it.

    ComfyUI's ``cuda_malloc`` puts that into the environment, of which torch reads it when it is first imported.
    """
    _find_comfyui()
    before = os.environ.get(_ALLOCATOR, "")
    importlib.import_module("cuda_malloc")
    if os.environ.get(_ALLOCATOR, "") != before and "cudaMallocAsync" not in before:
        os.execv(sys.executable, sys.orig_argv)


def start_dynamic_memory() -> None:
    """What ComfyUI's main program does before it loads models.

    Raises:
        RuntimeError: it has no dynamic memory here.
    """
    _find_comfyui()
    import comfy_aimdo.control

    comfy_aimdo.control.init()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    devices = comfy.model_management.get_all_torch_devices()
    if not comfy_aimdo.control.init_devices(device.index for device in devices):
        raise RuntimeError("ComfyUI's dynamic memory does not start; it needs an NVIDIA card and comfy-aimdo's library")
    # Otherwise its library writes lines for every weight that is used, of which stock uses more.
    comfy_aimdo.control.set_log_info()
    comfy.memory_management.aimdo_enabled = True
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic


def _find_comfyui() -> None:
    if os.environ["COMFYUI_PATH"] not in sys.path:
        sys.path.insert(0, os.environ["COMFYUI_PATH"])


def time_on_card(config: T5Config, folder: Path, rounds: int) -> Iterator[str]:
    """Lines of a table: for each way and prompt its time, that of stock as a multiple, and the largest difference.

    Behind it what is to be reached, and what was.
    """
    start_dynamic_memory()
    from comfy_nai_t5.choices import Settings
    from comfy_nai_t5.clip import with_our_t5

    state = {name: tensor.half() for name, tensor in random_state(config).items()}
    theirs = stock(write_file(folder / "t5.safetensors", state), "pixart")
    del state
    if not theirs.patcher.is_dynamic():
        raise RuntimeError(f"ComfyUI loads this T5 onto {theirs.patcher.load_device} without its dynamic memory")
    ours = {way: with_our_t5(theirs, Settings("float16", layout=layout)) for way, layout in _WAYS.items()}
    t5 = theirs.cond_stage_model.t5xxl.transformer
    lora = toy_lora(t5, tuple(f"encoder.block.0.layer.0.SelfAttention.{name}" for name in "qkv"), "t5xxl")
    rows: list[dict[str, Encoded]] = []
    for change, strength in (("", 0.0), (", with a LoRA", 0.5)):
        clips = {"stock": theirs, **ours}
        if strength:
            clips = {way: _with_lora(clip, lora, strength) for way, clip in clips.items()}
        for title, text in PROMPTS.items():
            rows.append(found := {})
            for way, clip in clips.items():
                found[way] = _encoded(clip, text, rounds)
                ratio = found["stock"].seconds / found[way].seconds
                difference = error(found[way].hidden.cpu(), found["stock"].hidden.cpu())
                told = "" if way == "stock" else _stack(clip).told
                cells = f"{found[way].seconds * 1e3:.2f} ms | {ratio:.2f}× | {difference:.1e}"
                taken = f"{clip.patcher.loaded_size() / 1e9:.2f} GB | {found[way].beside / 1e6:.0f} MB"
                yield f"| {title}{change} | {way} | {cells} | {taken} | {told} |"
    yield from ("", what_was_reached(rows))


def what_was_reached(rows: list[dict[str, Encoded]]) -> str:
    """Stock beside joined, in one sentence."""
    ratio = min(each["stock"].seconds / each["joined"].seconds for each in rows)
    joined, by_stock = (max(each[way].beside for each in rows) / 1e6 for way in ("joined", "stock"))
    return (
        f"Joined is to be at least {TO_REACH:.0f} times as fast as stock and to take no more of the card: it is "
        f"{ratio:.2f} times as fast at least, and takes {joined:.0f} MB beside the weights where stock takes "
        f"{by_stock:.0f}."
    )


def _stack(clip: Any) -> Any:
    from comfy_nai_t5.clip import t5_models

    (owner,) = t5_models(clip.cond_stage_model).values()
    return owner.transformer.stack


def _with_lora(clip: Any, lora: dict[str, torch.Tensor], strength: float) -> Any:
    import comfy.sd

    return comfy.sd.load_lora_for_models(None, clip, lora, 0, strength)[1]


def _encoded(clip: Any, text: str, rounds: int) -> Encoded:
    """Encodes with weights that are on the card."""
    for _ in range(3):
        hidden = conditioning(clip, text)["cond"]
    torch.cuda.reset_peak_memory_stats()
    before, seconds = torch.cuda.memory_allocated(), []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        hidden = conditioning(clip, text)["cond"]
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return Encoded(statistics.median(seconds), hidden, torch.cuda.max_memory_allocated() - before)
