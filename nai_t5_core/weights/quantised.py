"""Kinds of quantised files, known by their tensors' names: one that cannot be read is refused by the name of its kind.

Tables and pure functions over names and dtypes; of the tensors, only ComfyUI's notes on how it has quantised are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from nai_t5_core.facts.nested_text import parse_object
from nai_t5_core.weights.formats import Checkpoint, CheckpointError, TensorInfo
from nai_t5_core.weights.keymaps import KeyMap

# What stands behind a module that holds a weight, in Hugging Face's spelling.
_LEAF = re.compile(
    r"(?P<module>shared|encoder\.block\.\d+\.layer\.\d\.(SelfAttention|DenseReluDense)\.\w+)\.(?P<leaf>.+)"
)
_NOTE = "comfy_quant"
# The header of newer files of ComfyUI says for every module what a note says for one.
_HEADER = "_quantization_metadata"
_READABLE = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Signature:
    """A tensor that one kind of quantised file has for a module, and what stands beside it there.

    ``dtypes`` empty: of any; ``beside`` empty: nothing in particular.
    """

    kind: str
    leaf: re.Pattern[str]
    dtypes: tuple[torch.dtype, ...] = ()
    beside: tuple[str, ...] = ()

    def find(self, module: Mapping[str, TensorInfo]) -> str | None:
        """The leaf by which a module is of this kind."""
        if self.beside and not any(leaf in module for leaf in self.beside):
            return None
        fitting = (leaf for leaf, info in module.items() if not self.dtypes or info.dtype in self.dtypes)
        return next((leaf for leaf in fitting if self.leaf.fullmatch(leaf)), None)


def _signature(kind: str, leaf: str, *dtypes: str, beside: tuple[str, ...] = ()) -> Signature:
    # Older versions of torch lack some of these types.
    present = tuple(getattr(torch, name) for name in dtypes if hasattr(torch, name))
    return Signature(kind, re.compile(leaf), present, beside)


# The first that fits is the kind: those further down fit others too.
SIGNATURES = (
    _signature("NF4 of bitsandbytes", r"weight\.quant_state\.bitsandbytes__nf4"),
    _signature("FP4 of bitsandbytes", r"weight\.quant_state\.bitsandbytes__fp4"),
    _signature("4-bit of bitsandbytes", r"weight\.absmax"),
    _signature("int8 of bitsandbytes", r"SCB|weight_format"),
    _signature("quanto", r"weight\._(data|scale|shift)(\..*)?"),
    _signature("HQQ", r"W_q"),
    _signature("torchao", r"_?weight_qdata"),
    _signature("GPTQ", r"g_idx"),
    _signature("AWQ of Nunchaku", r"scaled_zeros|wzeros"),
    _signature("AWQ", r"qweight|qzeros"),
    _signature("NVFP4 of compressed-tensors", r"weight_global_scale"),
    _signature("compressed-tensors", r"weight_packed"),
    _signature("NVFP4", r"weight_scale_2"),
    _signature("MXFP8", r"weight_scale", "float8_e8m0fnu", "uint8"),
    _signature("float8 with a scale for each block", r"weight_scale_inv"),
    _signature("int8 with scales", r"weight", "int8", beside=("weight_scale", "scale_weight", "scale")),
)
# What ComfyUI calls its kinds.
_COMFYUI_KINDS = {"nvfp4": "NVFP4", "mxfp8": "MXFP8", "int8_tensorwise": "int8 of ComfyUI"}


def refuse_quantised(checkpoint: Checkpoint, keymap: KeyMap) -> None:
    """Refuses a checkpoint whose T5 is quantised in a way that cannot be read; its other parts may be.

    Raises:
        CheckpointError: with the name of the kind, how it was known, and what can be read.
    """
    blocked = next(((name, full) for name, full in keymap.names.items() if full in checkpoint.unreadable), None)
    if blocked is not None:
        name, full = blocked
        raise CheckpointError(
            f"{checkpoint.source} keeps {name} as {checkpoint.tensors[full].packing}, {checkpoint.unreadable[full]}; "
            "update it, or use another file of the same model"
        )
    found = next(_noted_kinds(checkpoint, keymap), None) or _kind_by_names(checkpoint, keymap)
    if found is not None:
        kind, mark = found
        raise CheckpointError(
            f"{checkpoint.source} holds a T5 quantised as {kind} (known by {mark}), which cannot be read; use a file "
            "of the same model in float32, bfloat16, float16 or float8 (plain, or with one scale for each weight or "
            "row), or a GGUF file"
        )


def _kind_by_names(checkpoint: Checkpoint, keymap: KeyMap) -> tuple[str, str] | None:
    modules: dict[str, dict[str, TensorInfo]] = {}
    for full, info in checkpoint.tensors.items():
        if match := _LEAF.fullmatch(keymap.hf_name(full) or ""):
            modules.setdefault(match["module"], {})[match["leaf"]] = info
    found = (
        (signature.kind, f"{module}.{leaf}")
        for signature in SIGNATURES
        for module, leaves in modules.items()
        if (leaf := signature.find(leaves))
    )
    return next(found, None)


def _noted_kinds(checkpoint: Checkpoint, keymap: KeyMap) -> Iterator[tuple[str, str]]:
    """Kinds that ComfyUI has written down for modules of the T5, other than those that can be read."""
    for full in checkpoint.tensors:
        name = keymap.hf_name(full) or ""
        if name.endswith(f".{_NOTE}"):
            yield from _unreadable(_object(bytes(checkpoint.read(full).view(torch.uint8).numpy())), full)
    layers = _object(checkpoint.metadata.get(_HEADER, "{}").encode()).get("layers")
    for module, note in layers.items() if isinstance(layers, dict) else ():
        if _LEAF.fullmatch(f"{keymap.hf_name(module) or ''}.weight") and isinstance(note, dict):
            yield from _unreadable(note, f"{_HEADER} in its header")


def _unreadable(note: dict[str, object], mark: str) -> Iterator[tuple[str, str]]:
    kind = str(note.get("format", _READABLE[0]))
    if kind not in _READABLE:
        yield _COMFYUI_KINDS.get(kind, f"{kind} of ComfyUI"), mark


def _object(text: bytes) -> dict[str, object]:
    """A note's content; damaged ones say nothing, and the names and dtypes beside them decide."""
    try:
        return parse_object(text)
    except ValueError:
        return {}
