"""LoRA files for toy encoders, as each kind of trainer writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nai_t5_core.facts.config import T5Config, encoder_tensors
from nai_t5_core.lora.changes import Change, LowRankChange, WholeChange
from nai_t5_core.lora.files import Lora

RANK = 4
ALPHA = 6.0


def projections(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Every weight that a LoRA may change, with its shape."""
    shapes = encoder_tensors(config).items()
    return {name: shape for name, shape in shapes if "block" in name and "norm" not in name and "bias" not in name}


def toy_lora(config: T5Config, seed: int = 0, targets: tuple[str, ...] = (), name: str = "toy") -> Lora:
    """Random changes, about as large as the weights, of all projections or those whose last names are given."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for weight, (rows, columns) in projections(config).items():
        up = torch.randn(rows, RANK, generator=generator) * 0.3
        down = torch.randn(RANK, columns, generator=generator) * columns**-0.5
        if not targets or weight.split(".")[-2] in targets:
            changes[weight] = LowRankChange(up, down, ALPHA / RANK)
    return Lora(name, changes)


def toy_tables(config: T5Config, seed: int = 3, only: str = "", name: str = "tables") -> Lora:
    """Changes of all that is no projection: narrow ones of the tables, whole ones of the norms.

    ``only`` is a part of their names.
    """
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Change] = {}
    for weight, shape in encoder_tensors(config).items():
        if weight in projections(config) or only not in weight:
            continue
        if len(shape) == 1:
            changes[weight] = WholeChange(torch.randn(shape, generator=generator) * 0.4)
        else:
            up = torch.randn(shape[0], RANK, generator=generator) * 0.5
            changes[weight] = LowRankChange(up, torch.randn(RANK, shape[1], generator=generator), ALPHA / RANK)
    return Lora(name, changes)


def toy_differences(config: T5Config, seed: int = 4, name: str = "differences") -> Lora:
    """Whole differences of the projections."""
    generator = torch.Generator().manual_seed(seed)
    shapes = projections(config).items()
    deltas = {weight: torch.randn(shape, generator=generator) * shape[1] ** -0.5 for weight, shape in shapes}
    return Lora(name, {weight: WholeChange(delta) for weight, delta in deltas.items()})


def with_loras(state: Mapping[str, Tensor], *loras: tuple[Lora, float]) -> dict[str, Tensor]:
    """The original weights with LoRAs added in float64."""
    changed = dict(state)
    for lora, strength in loras:
        for name, change in lora.changes.items():
            if isinstance(change, LowRankChange):
                delta = change.scale * (change.up.double() @ change.down.double())
            else:
                delta = change.delta.double()
            changed[name] = (changed[name].double() + strength * delta).to(state[name].dtype)
    return changed


def kohya(lora: Lora, prefix: str = "lora_te3") -> dict[str, Tensor]:
    out = {}
    for name, change in lora.changes.items():
        module = f"{prefix}_{name.removesuffix('.weight').replace('.', '_')}"
        out[f"{module}.lora_down.weight"] = change.down
        out[f"{module}.lora_up.weight"] = change.up
        out[f"{module}.alpha"] = torch.tensor(ALPHA)
    return out


def onetrainer(lora: Lora) -> dict[str, Tensor]:
    factors = dotted(lora, "lora_te3.", "lora_down", "lora_up", False)
    alphas = {f"lora_te3.{name.removesuffix('.weight')}.alpha": torch.tensor(ALPHA) for name in lora.changes}
    return factors | alphas


def dotted(lora: Lora, prefix: str, down: str, up: str, fold_scale: bool = True) -> dict[str, Tensor]:
    """Files without alpha: the scale is in the factors, or in a config elsewhere."""
    out = {}
    for name, change in lora.changes.items():
        module = prefix + name.removesuffix(".weight")
        out[f"{module}.{down}.weight"] = change.down
        out[f"{module}.{up}.weight"] = change.up * (change.scale if fold_scale else 1)
    return out


def write_style(style: str, lora: Lora, folder: Path) -> Path:
    """The LoRA in the style of a trainer; returns what a user would give."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{lora.name}.safetensors"
    if style == "peft folder":
        save_file(dotted(lora, "base_model.model.", "lora_A", "lora_B", False), folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {}}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder
    if style == "diffusers with a header":
        header = {"transformer.lora_alpha": 99, "text_encoder_2.lora_alpha": ALPHA, "text_encoder_2.r": RANK}
        tensors = dotted(lora, "text_encoder_2.", "lora_A", "lora_B", False)
        save_file(tensors, file, {"format": "pt", "lora_adapter_metadata": json.dumps(header)})
        return file
    save_file(STYLES[style](lora), file)
    return file


STYLES = {
    "kohya, third": kohya,
    "kohya, second": lambda lora: kohya(lora, "lora_te2"),
    "kohya, only": lambda lora: kohya(lora, "lora_te"),
    "OneTrainer": onetrainer,
    "diffusers": lambda lora: dotted(lora, "text_encoder_2.", "lora.down", "lora.up"),
    "diffusers, old": lambda lora: dotted(lora, "text_encoder.", "lora_linear_layer.down", "lora_linear_layer.up"),
    "ComfyUI": lambda lora: dotted(lora, "text_encoders.t5xxl.transformer.", "lora_A", "lora_B"),
    "peft, lone file": lambda lora: dotted(lora, "base_model.model.", "lora_A.default", "lora_B.default"),
}
ALL_STYLES = (*STYLES, "peft folder", "diffusers with a header")
