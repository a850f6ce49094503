"""ComfyUI's own T5 and ours in its dynamic memory, on a card: times, what is equal, and what of the card is taken."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterator
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


def start_dynamic_memory() -> None:
    """What ComfyUI's main program does before it loads models.

    Raises:
        RuntimeError: it has no dynamic memory here.
    """
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy_aimdo.control

    comfy_aimdo.control.init()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    devices = comfy.model_management.get_all_torch_devices()
    if not comfy_aimdo.control.init_devices(device.index for device in devices):
        raise RuntimeError("ComfyUI's dynamic memory does not start; it needs an NVIDIA card and comfy-aimdo's library")
    comfy.memory_management.aimdo_enabled = True
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic


def time_on_card(config: T5Config, folder: Path, rounds: int) -> Iterator[str]:
    """Lines of a table: for each way and prompt its time, that of stock as a multiple, and the largest difference."""
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
    for change, strength in (("", 0.0), (", with a LoRA", 0.5)):
        clips = {"stock": theirs, **ours}
        if strength:
            clips = {way: _with_lora(clip, lora, strength) for way, clip in clips.items()}
        for title, text in PROMPTS.items():
            found: dict[str, tuple[float, Any]] = {}
            for way, clip in clips.items():
                found[way] = _median(clip, text, rounds)
                _, hidden = found[way]
                ratio = found["stock"][0] / found[way][0]
                difference = error(hidden.cpu(), found["stock"][1].cpu())
                taken = theirs.patcher.loaded_size() / 1e9
                told = "" if way == "stock" else _stack(clip).told
                cells = f"{found[way][0] * 1e3:.2f} ms | {ratio:.2f}× | {difference:.1e} | {taken:.2f} GB | {told}"
                yield f"| {title}{change} | {way} | {cells} |"


def _stack(clip: Any) -> Any:
    from comfy_nai_t5.clip import t5_models

    (owner,) = t5_models(clip.cond_stage_model).values()
    return owner.transformer.stack


def _with_lora(clip: Any, lora: dict[str, torch.Tensor], strength: float) -> Any:
    import comfy.sd

    return comfy.sd.load_lora_for_models(None, clip, lora, 0, strength)[1]


def _median(clip: Any, text: str, rounds: int) -> tuple[float, torch.Tensor]:
    """Seconds of an encode whose weights are on the card, and its result."""
    for _ in range(3):
        hidden = conditioning(clip, text)["cond"]
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        hidden = conditioning(clip, text)["cond"]
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), hidden
