"""A real ComfyUI in this process, and toy text encoders for it. Needs COMFYUI_PATH, a checkout whose requirements are
installed; without it the tests of this folder are skipped.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import spiece_tensor, write_file
from conftest import random_state
from torch import Tensor

from nai_t5_core.backends.kernels.build import nearest_set, why_not_kernels
from nai_t5_core.backends.products import INT8_ONEDNN
from nai_t5_core.facts.config import T5Config

# What a T5 whose products are joined says of itself: of this processor's kernels too, if it has them.
KERNELS = "" if why_not_kernels() else f" with {nearest_set().title} kernels"
FUSED, PACKED, INT8 = (f"{name} layout{KERNELS}" for name in ("fused", "packed", "int8"))

# Of hidden states in 8 bits against exact ones, relative to the largest: a unit is 1/127 of the largest of a row.
NEAR_IN_8_BITS = 0.05
_NO_8_BITS = INT8_ONEDNN.missing(torch.device("cpu"), torch.float32)
needs_8_bits = pytest.mark.skipif(_NO_8_BITS is not None, reason=str(_NO_8_BITS))


def require_comfyui() -> Path:
    """Makes ComfyUI importable, on the CPU; skips the calling test file where there is none."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH is not set: give a ComfyUI checkout to run these", allow_module_level=True)
    if path not in sys.path:
        sys.path.insert(0, path)
    from comfy.cli_args import args

    args.cpu = True
    return Path(path)


_TOY = {"d_model": 64, "d_kv": 16, "d_ff": 80, "num_heads": 4, "num_layers": 3}
V1_1 = T5Config(vocab_size=32128, **_TOY)
V1_0 = T5Config(vocab_size=32128, gated=False, activation="relu", **_TOY)
PILE = T5Config(vocab_size=32128, bias_per_layer=True, **_TOY)
UMT5 = T5Config(vocab_size=4096, bias_per_layer=True, **_TOY)  # as many tokens as the toy tokenizer has

FAMILY_CONFIGS = {
    "pixart": V1_1,
    "chroma": V1_1,
    "ltxv": V1_1,
    "mochi": V1_1,
    "cogvideox": V1_1,
    "cosmos": V1_0,
    "wan": UMT5,
    "auraflow": PILE,
    "stable_audio": V1_0,
    "ace": UMT5,
}


def knows(family: str) -> bool:
    """Whether the running ComfyUI is new enough for a family."""
    from comfy_nai_t5.families import FAMILIES

    try:
        FAMILIES[family].classes()
    except ValueError:
        return False
    return True


def toy_state(config: T5Config, seed: int = 0) -> dict[str, Tensor]:
    state = random_state(config, seed)
    return state | {"spiece_model": spiece_tensor()} if config.vocab_size == 4096 else state


def toy_file(folder: Path, config: T5Config, seed: int = 0) -> Path:
    return write_file(folder / f"toy{seed}.safetensors", toy_state(config, seed))


def toy_family(name: str) -> Any:
    """A family that takes a T5 of any size."""
    from comfy_nai_t5.families import FAMILIES

    return replace(FAMILIES[name], checkpoint=None)


def stock(path: Path | None, family: str) -> Any:
    """ComfyUI's own CLIP of a toy."""
    from comfy_nai_t5.checkpoint import read_checkpoint
    from comfy_nai_t5.loaders import stock_clip

    return stock_clip(read_checkpoint(path), toy_family(family))


def conditioning(clip: Any, text: str) -> dict[str, Any]:
    """What CLIPTextEncode makes of a text."""
    import nodes

    with torch.inference_mode():
        (((states, extras),),) = nodes.CLIPTextEncode().encode(clip, text)
    return {"cond": states, **extras}


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def assert_equal_conditioning(actual: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Same entries, same shapes, and values within the tolerance of the largest."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert actual[name].dtype == value.dtype
            assert error(actual[name], value) < tolerance, name
        else:
            assert actual[name] == value, name


def toy_lora(model: Any, keys: tuple[str, ...], slot: str, rank: int = 4, seed: int = 7) -> dict[str, Tensor]:
    """A LoRA on modules of a T5 (such as "encoder.block.0.layer.0.SelfAttention.q"), in ComfyUI's general spelling."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for key in keys:
        module = model.get_submodule(key)
        # Of a weight that stays quantised, ComfyUI sees bytes.
        out_features, in_features = getattr(module, "numbers_shape", None) or module.weight.shape
        name = f"text_encoders.{slot}.transformer.{key}"
        lora[f"{name}.lora_up.weight"] = torch.randn(out_features, rank, generator=generator) * 0.2
        lora[f"{name}.lora_down.weight"] = torch.randn(rank, in_features, generator=generator) * 0.2
    return lora
