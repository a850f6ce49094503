"""LoRA files of kohya, OneTrainer, peft, diffusers and ComfyUI, read as changes of a T5 encoder's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nai_t5_core.facts.config import Shape
from nai_t5_core.facts.nested_text import parse_object
from nai_t5_core.facts.paths import user_path
from nai_t5_core.lora.adapter_config import AdapterConfig
from nai_t5_core.lora.changes import Change, LowRankChange, WholeChange
from nai_t5_core.lora.keys import LoraKeyMap, Role, additions, map_lora_names
from nai_t5_core.weights.formats import Checkpoint, CheckpointError, open_checkpoint

# What the folder of an adapter holds: peft's names, then diffusers'.
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
# Where diffusers puts peft's config in a safetensors header.
_HEADER_CONFIG = "lora_adapter_metadata"
# Faults in a message; the rest is a number.
_SHOWN = 8
# Beyond any that is trained with: those are about the rank.
_MOST_ALPHA = 1e9
_PAIR: tuple[Role, Role] = ("up", "down")


@dataclass(frozen=True)
class Lora:
    """The changes that a LoRA makes to a T5 encoder.

    Attributes:
        name: of the file or folder.
        changes: by the Hugging Face names of the weights.
        others: tensors of the file that are for other parts of a diffusion model, each with the part.
        zeros: tensors for the T5 that are zero and so change nothing, or go with such.
    """

    name: str
    changes: Mapping[str, Change]
    others: Mapping[str, str] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()

    def other_parts(self) -> dict[str, int]:
        """How many tensors the file has for each other part."""
        return dict(Counter(self.others.values()))

    def __repr__(self) -> str:
        others = f"; tensors for other parts: {counted(self.other_parts())}" if self.others else ""
        zeros = f"; {len(self.zeros)} tensors that change nothing" if self.zeros else ""
        return f"Lora({self.name}: {len(self.changes)} weights of the T5{zeros}{others})"


def counted(parts: Mapping[str, int]) -> str:
    """In words: "the transformer (494), a CLIP text encoder (216)"."""
    return ", ".join(f"{part} ({count})" for part, count in parts.items())


def listed(faults: list[str]) -> str:
    """One on each line, as many as can be read at a glance."""
    more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return "".join(f"\n  - {fault}" for fault in faults[:_SHOWN] + more)


def read_lora(source: str | Path, alpha: float | None = None) -> Lora:
    """Reads what a LoRA file has for a T5 encoder.

    Args:
        source: a safetensors or PyTorch file, or the folder of a peft adapter.
        alpha: for files that have none. The strength of a weight's change is alpha / rank; alpha is taken from the
            file's own tensors, from peft's adapter_config.json beside it, or from the header that diffusers writes.
            Where there is none, it is the rank, as in ComfyUI and diffusers.

    Beside the factors of projections, embedding and bias tables, whole differences are read (``.diff``), of norms as
    well. What is zero is left out.

    Raises:
        CheckpointError: no such file, nothing in it for a T5 encoder, keys that are not known (unless they are zeros
            that would be added), a factor that is absent or misshapen, a peft adapter without its config, or one that
            is no plain LoRA. All faults are listed.
    """
    path = user_path(source)
    checkpoint = _open(path)
    keymap = map_lora_names(checkpoint.tensors, str(path))
    zeros = _take_zeros(keymap, checkpoint)
    _refuse_faults(keymap, checkpoint, zeros)
    config = _adapter_config(checkpoint, keymap.prefix, alpha)
    changes = {weight: _change(weight, names, checkpoint, config) for weight, names in keymap.weights.items()}
    zeros += [name for weight, names in keymap.weights.items() if changes[weight].is_zero for name in names.values()]
    changes = {weight: change for weight, change in changes.items() if not change.is_zero}
    return Lora(path.name if path.is_dir() else path.stem, changes, keymap.others, tuple(zeros))


def _open(path: Path) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a LoRA file, or the folder of a peft adapter")
    if path.is_dir():
        file = next((path / name for name in _ADAPTER_FILES if (path / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"{path} holds no adapter (looked for {', '.join(_ADAPTER_FILES)}); give the file")
        path = file
    checkpoint = open_checkpoint(path)
    if path.name.startswith("adapter_model."):
        checkpoint.folder = path.parent
    return checkpoint


def _take_zeros(keymap: LoraKeyMap, checkpoint: Checkpoint) -> list[str]:
    """Takes from what is unknown the tensors that add nothing, with their other factors."""
    zeros = []
    for added, beside in additions(keymap):
        if not any(checkpoint.read(name).any() for name in added):
            zeros += added + beside
    for name in zeros:
        del keymap.unknown[name]
    return zeros


def _refuse_faults(keymap: LoraKeyMap, checkpoint: Checkpoint, zeros: list[str]) -> None:
    shapes = checkpoint.shapes
    faults = [f"{name}: {reason}" for name, reason in keymap.unknown.items()]
    without_values = map_lora_names(checkpoint.others, checkpoint.source).weights.values()
    faults += [f"{name}: {checkpoint.others[name]}" for names in without_values for name in names.values()]
    for weight, names in keymap.weights.items():
        faults += _faults_of(weight, names, shapes)
        kinds = {name: checkpoint.tensors[name].dtype for name in names.values()}
        faults += [f"{name}: {dtype}, and real numbers are needed" for name, dtype in kinds.items() if dtype.is_complex]
    if faults:
        raise CheckpointError(f"{checkpoint.source} can't be used as a LoRA of a T5 encoder:{listed(faults)}")
    if not keymap.weights and not zeros:
        parts = counted(Counter(keymap.others.values())) or "nothing"
        raise CheckpointError(f"{checkpoint.source} has no LoRA for a T5 encoder; it holds tensors for {parts}")


def _faults_of(weight: str, names: Mapping[Role, str], shapes: Mapping[str, Shape]) -> Iterator[str]:
    if "difference" in names:
        more = [name for role, name in names.items() if role not in ("difference", "alpha")]
        if more:
            yield f"{', '.join(more)}: factors beside a whole difference, {names['difference']}"
        return
    pair: tuple[Role, Role] = ("table_up", "table_down") if "table_up" in names or "table_down" in names else _PAIR
    absent = [role.removeprefix("table_") for role in pair if role not in names]
    if absent:
        yield f"{', '.join(names.values())}: no factor {' and '.join(absent)} beside it"
        return
    up, down = (shapes[names[role]] for role in pair)
    if pair != _PAIR:
        up, down = up[::-1], down[::-1]
    if len(up) != 2 or len(down) != 2 or up[1] != down[0] or not down[0]:
        yield f"{weight}: factors of shapes {list(up)} and {list(down)} have no common rank"
    elif "alpha" in names and shapes[names["alpha"]] not in ((), (1,)):
        yield f"{names['alpha']}: shape {list(shapes[names['alpha']])}, not one number"


def _adapter_config(checkpoint: Checkpoint, prefix: str, alpha: float | None) -> AdapterConfig:
    """peft's config of the T5's part of the file, or what stands for it."""
    if checkpoint.folder is not None:
        values = _config_beside(checkpoint, alpha)
    elif _HEADER_CONFIG in checkpoint.metadata:
        values = _config_in_header(checkpoint, prefix)
    else:
        values = {}
    if "lora_alpha" not in values and alpha is not None:
        values["lora_alpha"] = alpha
    try:
        config = AdapterConfig.read(values)
    except ValueError as error:
        raise CheckpointError(f"the adapter config of {checkpoint.source} {error}") from error
    if config.use_dora or config.peft_type != "LORA":
        kind = "DoRA" if config.use_dora else config.peft_type
        raise CheckpointError(f"{checkpoint.source} is {kind}, which is not supported; a plain LoRA is needed")
    return config


def _config_beside(checkpoint: Checkpoint, alpha: float | None) -> dict[str, Any]:
    assert checkpoint.folder is not None
    path = checkpoint.folder / "adapter_config.json"
    if path.is_file():
        return _json_object(path.read_bytes(), str(path))
    if alpha is None:
        raise CheckpointError(
            f"{checkpoint.source} has no adapter_config.json beside it, which tells alpha; give alpha="
        )
    return {}


def _config_in_header(checkpoint: Checkpoint, prefix: str) -> dict[str, Any]:
    values = _json_object(checkpoint.metadata[_HEADER_CONFIG].encode(), f"the header of {checkpoint.source}")
    component = prefix.split(".")[0] + "."
    return {name.removeprefix(component): value for name, value in values.items() if name.startswith(component)}


def _json_object(content: bytes, source: str) -> dict[str, Any]:
    try:
        return parse_object(content)
    except ValueError as error:
        raise CheckpointError(f"{source} is not readable JSON: {error}") from error


def _change(weight: str, names: Mapping[Role, str], checkpoint: Checkpoint, config: AdapterConfig) -> Change:
    if "difference" in names:
        return WholeChange(checkpoint.read(names["difference"]))
    if "table_up" in names:
        up, down = checkpoint.read(names["table_up"]).T, checkpoint.read(names["table_down"]).T
    else:
        up, down = checkpoint.read(names["up"]), checkpoint.read(names["down"])
    rank = down.shape[0]
    if "alpha" in names:
        alpha: float | None = float(checkpoint.read(names["alpha"]))
        divisor = float(rank)
    else:
        alpha = config.alpha(weight.removesuffix(".weight"))
        divisor = rank**0.5 if config.use_rslora else rank
    if alpha is not None and not abs(alpha) <= _MOST_ALPHA:
        raise CheckpointError(f"{checkpoint.source} has an alpha of {alpha} for {weight}; the file is damaged")
    return LowRankChange(up, down, 1.0 if alpha is None else alpha / divisor)
