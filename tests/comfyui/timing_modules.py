"""One prompt through ComfyUI's own CLIP and through ours, at any size, in one process and in turn."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import spiece_tensor, write_file
from comfy_toys import conditioning, error, require_comfyui, stock, toy_family
from conftest import random_state

from nai_t5_core.facts.config import T5Config

TOKENS = (20, 40, 60)
_TEXT = (
    "an oil painting of a crowded market in autumn: a woman in a green coat sells pears and plums from a cart, dogs "
    "run after small children, steam rises from a kettle, and far behind the roofs a storm gathers over the harbour, "
    "where fishing boats with peeling paint lie under warm lamps"
)


@dataclass(frozen=True)
class Case:
    """A family at a length: ``kind`` is what its T5 has of its own, beside the sizes."""

    title: str
    family: str
    length: int
    kind: dict[str, Any]


_V1_0 = {"gated": False, "activation": "relu"}
_UMT5 = {"vocab_size": 4096, "bias_per_layer": True}  # as many tokens as the toy tokenizer has
_PILE = {"vocab_size": 32128, "bias_per_layer": True, "pad_token_id": 1, "eos_token_id": 2}

CASES = {
    "wan": Case("Wan: masked, then zeroed", "wan", 512, _UMT5),
    "cosmos": Case("Cosmos: masked, then zeroed", "cosmos", 512, _V1_0),
    "auraflow": Case("AuraFlow: masked, then zeroed", "auraflow", 256, _PILE),
    "stable-audio-256": Case("Stable Audio at 256: masked, then zeroed", "stable_audio", 256, _V1_0),
    "stable-audio": Case("Stable Audio: masked, then zeroed", "stable_audio", 128, _V1_0),
    "mochi": Case("Mochi: masked, all rows kept", "mochi", 256, {}),
    "ltxv": Case("LTX-Video: masked, all rows kept", "ltxv", 128, {}),
    "flux": Case("as Flux's T5: no mask", "pixart", 256, {}),
}


@dataclass(frozen=True)
class Times:
    """Seconds of each prompt (medians), and the largest difference relative to the largest value."""

    stock: tuple[float, ...]
    ours: tuple[float, ...]
    difference: float

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(a / b for a, b in zip(self.stock, self.ours, strict=True))

    def cells(self) -> str:
        stock, ours = (f"{statistics.median(each) * 1e3:.0f} ms" for each in (self.stock, self.ours))
        each = ", ".join(f"{ratio:.1f}" for ratio in self.ratios)
        return f"{stock} | {ours} | {statistics.median(self.ratios):.1f}× | {each} | {self.difference:.1e}"


def time_case(
    case: Case, sizes: T5Config, folder: Path, rounds: int, layout: str, stored: torch.dtype = torch.float16
) -> Times:
    """Both from one file in ``stored``: stock, which computes in float32, and *Load T5 (NAI)* in bfloat16."""
    require_comfyui()
    path = _file(folder, sizes.model_copy(update=case.kind), stored)
    clips = [stock(path, case.family), _ours(path, case.family, layout)]
    slot = toy_family(case.family).slot
    conditioning(clips[1], _TEXT)  # packed weights are packed by the second call
    prompts = [_prompt(clips[0], slot, count) for count in TOKENS]
    for clip in clips:
        clip.set_tokenizer_option(f"{slot}_min_length", case.length)
    medians: tuple[list[float], list[float]] = ([], [])
    differences = []
    for prompt in prompts:
        theirs, mine = (conditioning(clip, prompt)["cond"] for clip in clips)
        assert theirs.shape[1] == case.length
        differences.append(error(mine, theirs))
        seconds = [[_seconds(partial(conditioning, clip, prompt)) for clip in clips] for _ in range(rounds)]
        for number, one in enumerate(medians):
            one.append(statistics.median(each[number] for each in seconds))
    return Times(tuple(medians[0]), tuple(medians[1]), max(differences))


def _prompt(clip: Any, slot: str, count: int) -> str:
    """As many words as have so many tokens, or a few fewer."""
    clip.set_tokenizer_option(f"{slot}_min_length", 1)
    words = _TEXT.split()
    while len(clip.tokenize(" ".join(words))[slot][0]) > count:
        words.pop()
    return " ".join(words)


def _file(folder: Path, config: T5Config, stored: torch.dtype) -> Path:
    state = {name: tensor.to(stored) for name, tensor in random_state(config).items()}
    if config.vocab_size == _UMT5["vocab_size"]:
        state["spiece_model"] = spiece_tensor()
    return write_file(folder / "t5.safetensors", state)


def _ours(path: Path, family: str, layout: str) -> Any:
    """From the node, for a family that takes a T5 of any size."""
    import folder_paths

    from comfy_nai_t5 import families, nodes

    folder_paths.add_model_folder_path("text_encoders", str(path.parent), is_default=True)
    folder_paths.filename_list_cache.clear()
    families.FAMILIES[family] = toy_family(family)
    settings = {"dtype": "bfloat16", "weights": "auto", "device": "default", "layout": layout}
    return nodes.LoadT5.execute(t5_name=path.name, family=family, **settings).args[0]


def _seconds(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
