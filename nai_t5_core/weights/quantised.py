"""Which weights of a checkpoint are quantised, in which kind, and which of its tensors stand for them.

Of the tensors, only notes on how a weight was quantised are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from nai_t5_core.backends.quantised.blocks import BlockKind
from nai_t5_core.backends.quantised.four_bits import FourBits
from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.backends.quantised.kinds import WEIGHT, Kind, QuantisedWeight
from nai_t5_core.backends.quantised.scaled import FLOAT8, FLOATS, MXFP8, NVFP4, SCALE, SCALE_2, Scaled
from nai_t5_core.facts.nested_text import parse_object
from nai_t5_core.weights.formats import Checkpoint, CheckpointError, TensorInfo
from nai_t5_core.weights.keymaps import KeyMap
from nai_t5_core.weights.rows_in_file import RowsInFile
from nai_t5_core.weights.signatures import kind_by_names

# What stands behind a module that holds a weight, in Hugging Face's spelling.
_LEAF = re.compile(
    r"(?P<module>shared|lm_head|(?:en|de)coder\.block\.\d+\.layer\.\d\.(SelfAttention|EncDecAttention|DenseReluDense)"
    r"\.\w+)\.(?P<leaf>.+)"
)
_NOTE = "comfy_quant"
# The header of newer files of ComfyUI says for every module what a note says for one.
_HEADER = "_quantization_metadata"
_FLOAT8_NOTES = ("float8_e4m3fn", "float8_e5m2")
# Where bitsandbytes writes what is no tensor.
_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
# Orders of the numbers of its int8 weights, by the number in a file; the first is that of every other file.
_BNB_ORDERS = ("row", "col32", "col_turing", "col_ampere")
_BNB_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
# What files call the scale beside a weight of one byte.
_SCALES = ("weight_scale", "scale_weight", "scale")
_TILES = (128, 128)


@dataclass(frozen=True)
class Stored:
    """A weight that is quantised in its file.

    Attributes:
        kind: what its bytes mean.
        shape: rows and columns of the numbers.
        parts: the file's name for each tensor that stands for it, by the kind's name for it.
        beside: further tensors of the file that have served their purpose, or have none here.
    """

    kind: Kind
    shape: tuple[int, int]
    parts: dict[str, str]
    beside: tuple[str, ...] = ()

    @property
    def is_plain_float8(self) -> bool:
        """Whether it is float8 without any scale, which torch knows as a dtype."""
        return self.kind.name.startswith("float8") and SCALE not in self.parts

    def fault(self, checkpoint: Checkpoint) -> str | None:
        """What is wrong with the tensors' shapes and dtypes."""
        infos = {name: checkpoint.tensors[full] for name, full in self.parts.items()}
        layout = {
            name: (self._shape_of(info), info.dtype if not info.packing else torch.uint8)
            for name, info in infos.items()
        }
        return self.kind.fault(layout, self.shape)

    def _shape_of(self, info: TensorInfo) -> tuple[int, ...]:
        if not info.packing:
            return info.shape
        kind = GGML_KINDS[info.packing]
        return (*info.shape[:-1], info.shape[-1] // kind.block * kind.size)

    def nbytes(self, checkpoint: Checkpoint) -> int:
        """The bytes of the tensors that stand for it."""
        infos = [checkpoint.tensors[full] for full in self.parts.values()]
        return sum(
            int(torch.Size(self._shape_of(info)).numel()) * (1 if info.packing else info.dtype.itemsize)
            for info in infos
        )

    def weight(self, checkpoint: Checkpoint) -> QuantisedWeight:
        """The weight, as it lies in the file."""
        parts = {name: checkpoint.as_it_lies(full) for name, full in self.parts.items()}
        if isinstance(self.kind, FourBits):
            parts = self.kind.arranged(parts, self.shape[0])
        info = checkpoint.tensors[self.parts[WEIGHT]]
        rows = None
        if isinstance(self.kind, BlockKind) and info.start is not None:
            rows = RowsInFile.of(info.file, info.start, parts[WEIGHT])
        return QuantisedWeight(self.kind, self.shape, parts, rows)


def find_quantised(checkpoint: Checkpoint, keymap: KeyMap) -> dict[str, Stored]:
    """The quantised weights of a checkpoint's T5, by their Hugging Face names; its other parts may be anything.

    Raises:
        CheckpointError: one is of a kind that cannot be read, with its name and how it was known.
    """
    _refuse_unreadable_blocks(checkpoint, keymap)
    modules = _modules(checkpoint, keymap)
    notes = dict(_notes(checkpoint, keymap, modules))
    found: dict[str, Stored] = {}
    others = {}
    for module, leaves in modules.items():
        infos = {leaf: checkpoint.tensors[full] for leaf, full in leaves.items()}
        stored = _stored(module, leaves, infos, notes.get(module, {}), checkpoint)
        if stored is not None:
            found[f"{module}.weight"] = stored
        else:
            others[module] = infos
    unknown = kind_by_names(others)
    if unknown is not None:
        _refuse(checkpoint, *unknown)
    return found


def _refuse(checkpoint: Checkpoint, kind: str, mark: str) -> None:
    raise CheckpointError(
        f"{checkpoint.source} holds a T5 quantised as {kind} (known by {mark}), which cannot be read; use a file "
        "of the same model in float32, bfloat16, float16, float8 or int8, in 4 bits of bitsandbytes, in a kind of "
        "ComfyUI's, or a GGUF file"
    )


def _refuse_unreadable_blocks(checkpoint: Checkpoint, keymap: KeyMap) -> None:
    blocked = next(((name, full) for name, full in keymap.names.items() if full in checkpoint.unreadable), None)
    if blocked is not None:
        name, full = blocked
        raise CheckpointError(
            f"{checkpoint.source} keeps {name} as {checkpoint.tensors[full].packing}, {checkpoint.unreadable[full]}; "
            "update it, or use another file of the same model"
        )


def _modules(checkpoint: Checkpoint, keymap: KeyMap) -> dict[str, dict[str, str]]:
    """The file's names for the tensors of every module that holds a matrix, by what stands behind the module's name."""
    modules: dict[str, dict[str, str]] = {}
    placed = {full: name for name, full in keymap.names.items()}
    for full in checkpoint.tensors:
        # A copy of the embedding that stands for it has its place by now.
        if match := _LEAF.fullmatch(placed.get(full) or keymap.hf_name(full) or ""):
            modules.setdefault(match["module"], {})[match["leaf"]] = full
    scale = keymap.scales.get("shared.weight")
    if scale is not None and "shared" in modules:
        modules["shared"].setdefault("weight_scale", scale)
    return modules


def _stored(
    module: str,
    leaves: dict[str, str],
    infos: Mapping[str, TensorInfo],
    note: Mapping[str, object],
    checkpoint: Checkpoint,
) -> Stored | None:
    """How a module's weight is quantised; None where it is not, or in a way that is not known here.

    Raises:
        CheckpointError: ComfyUI's note names another kind.
    """
    weight = infos.get("weight")
    if weight is None:
        return _named_blocks(leaves, infos)
    if len(weight.shape) != 2:
        return None
    if weight.packing in GGML_KINDS:
        return Stored(GGML_KINDS[weight.packing], _matrix(weight.shape), {WEIGHT: leaves["weight"]})
    if (state := next((leaf for leaf in _STATES if leaf in leaves), None)) is not None:
        return _four_bits(leaves, state, checkpoint)
    scale = next((leaf for leaf in _SCALES if leaf in leaves), None)
    parts = {WEIGHT: leaves["weight"], **({SCALE: leaves[scale]} if scale else {})}
    shape = _matrix(weight.shape)
    kind = str(note.get("format", _FLOAT8_NOTES[0]))
    if kind == "nvfp4":
        second = {SCALE_2: leaves[SCALE_2]} if SCALE_2 in leaves else {}
        return Stored(NVFP4(), (shape[0], shape[1] * 2), parts | second)
    if kind == "mxfp8":
        return Stored(MXFP8(), shape, parts)
    if kind == "int8_tensorwise":
        turned = _turned(note)
        name = f"int8, rotated in groups of {turned}" if turned else "int8"
        return Stored(Scaled(name, torch.int8, turned=turned), shape, parts)
    if kind not in _FLOAT8_NOTES:
        _refuse(checkpoint, f"{kind} of ComfyUI", f"the note of {module}")
    if scale is not None and infos[scale].dtype not in FLOATS:
        return None  # powers of two, as MXFP8 has them, in an order that nothing tells
    if weight.dtype == torch.int8 and "SCB" in leaves:
        return _llm_int8(module, leaves, shape, checkpoint)
    return _without_note(leaves, weight, shape, parts)


def _named_blocks(leaves: dict[str, str], infos: Mapping[str, TensorInfo]) -> Stored | None:
    """Blocks in a file of our own, where the kind stands behind the weight's name."""
    for name, kind in GGML_KINDS.items():
        info = infos.get(f"weight.{name}")
        if info is not None and len(info.shape) == 2:
            rows, width = info.shape
            return Stored(kind, (rows, width // kind.size * kind.block), {WEIGHT: leaves[f"weight.{name}"]})
    return None


def _without_note(
    leaves: dict[str, str], weight: TensorInfo, shape: tuple[int, int], parts: dict[str, str]
) -> Stored | None:
    if weight.dtype == torch.int8 and SCALE in parts and "weight_format" not in leaves:
        return Stored(Scaled("int8", torch.int8), shape, parts)
    if weight.dtype not in FLOAT8:
        return None
    name = str(weight.dtype).removeprefix("torch.")
    if "weight_scale_inv" in leaves:
        inverse = {WEIGHT: leaves["weight"], SCALE: leaves["weight_scale_inv"]}
        return Stored(Scaled(f"{name} in blocks", weight.dtype, _TILES), shape, inverse)
    return Stored(Scaled(name, weight.dtype), shape, parts)


def _llm_int8(module: str, leaves: dict[str, str], shape: tuple[int, int], checkpoint: Checkpoint) -> Stored:
    """An int8 weight of bitsandbytes.

    Raises:
        CheckpointError: its numbers lie in the order of some GPU, as older versions saved them.
    """
    beside = tuple(leaves[leaf] for leaf in ("weight_format",) if leaf in leaves)
    for full in beside:
        order = int.from_bytes(_content(checkpoint, full), "little")
        if order:
            told = _BNB_ORDERS[order] if order < len(_BNB_ORDERS) else f"number {order}"
            _refuse(checkpoint, f"int8 of bitsandbytes in the order {told}", f"{module}.weight_format")
    kind = Scaled("int8 of bitsandbytes", torch.int8, unit=1 / 127)
    return Stored(kind, shape, {WEIGHT: leaves["weight"], SCALE: leaves["SCB"]}, beside)


def _turned(note: Mapping[str, object]) -> int:
    """The columns of a group that were rotated together; 0 where none were."""
    inside = note.get("params")
    told = {**(inside if isinstance(inside, dict) else {}), **note}
    size = told.get("convrot_groupsize", 256)
    return (size if isinstance(size, int) else -1) if told.get("convrot") else 0


def _four_bits(leaves: dict[str, str], state: str, checkpoint: Checkpoint) -> Stored:
    told = _object(_content(checkpoint, leaves[state]))
    name = f"{state[-3:].upper()} of bitsandbytes"
    shape, block, nested = told.get("shape"), told.get("blocksize"), told.get("nested_blocksize", 0)
    offset = told.get("nested_offset", 0.0)
    is_matrix = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
    if not is_matrix or type(block) is not int or type(nested) is not int or not isinstance(offset, (int, float)):
        raise CheckpointError(
            f"{checkpoint.source} is damaged: {leaves[state]}, which tells shape and blocks of {name}, cannot be read; "
            "fetch it again"
        )
    assert isinstance(shape, list)
    parts = {part: leaves[f"weight.{part}"] for part in _BNB_PARTS if f"weight.{part}" in leaves}
    is_nested = "nested_absmax" in parts
    kind = FourBits(name, block, nested if is_nested else 0, float(offset) if is_nested else 0.0)
    return Stored(kind, (shape[0], shape[1]), {WEIGHT: leaves["weight"], **parts}, (leaves[state],))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], shape[1]


# ---------------------------------------------------------------------------------------------------------------------
# Notes
# ---------------------------------------------------------------------------------------------------------------------


def _notes(
    checkpoint: Checkpoint, keymap: KeyMap, modules: Mapping[str, Mapping[str, str]]
) -> Iterator[tuple[str, dict[str, object]]]:
    """What ComfyUI has written down of modules, in the header and then beside each."""
    layers = _object(checkpoint.metadata.get(_HEADER, "{}").encode()).get("layers")
    for full, note in layers.items() if isinstance(layers, dict) else ():
        module = _LEAF.fullmatch(f"{keymap.hf_name(full) or ''}.weight")
        if module is not None and isinstance(note, dict):
            yield module["module"], note
    for module_name, leaves in modules.items():
        if _NOTE in leaves:
            yield module_name, _object(_content(checkpoint, leaves[_NOTE]))


def _content(checkpoint: Checkpoint, full: str) -> bytes:
    return bytes(checkpoint.read(full).cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _object(text: bytes) -> dict[str, object]:
    """A note's content; damaged ones say nothing, and the names and dtypes beside them decide."""
    try:
        return parse_object(text)
    except ValueError:
        return {}
