"""Any checkpoint to our own quantised file, weight by weight. Loading it is a map.

The file has the original tensors under their Hugging Face names, with no norm and no scale multiplied into them:
quantised that way, the few large channels of a norm do not take bits from the others. Int8 and float8 are written as
ComfyUI names them. A weight in blocks of a kind of GGUF's has that kind behind its name, such as ``q.weight.Q8_0``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from nai_t5_core.backends.quantised.blocks import BlockKind
from nai_t5_core.backends.quantised.kinds import Layout, QuantisedWeight
from nai_t5_core.backends.quantised.packing import KINDS, PackedKind, pack, packed_layout, refuse_kind
from nai_t5_core.facts.config import Shape, decoder_tensors, encoder_tensors
from nai_t5_core.tokenizer import load_tokenizer
from nai_t5_core.weights import native
from nai_t5_core.weights.convert import Conversion, HashingReader, vocabulary_tensor
from nai_t5_core.weights.examine import Examination, ModelSource, decoder_faults, examine, find_tokenizer, settle_head
from nai_t5_core.weights.formats import CheckpointError, write_safetensors
from nai_t5_core.weights.held_weights import refuse_scales

log = logging.getLogger(__name__)

# What ComfyUI calls the kinds that it knows.
_NOTES = {"int8": {"format": "int8_tensorwise"}, "float8": {"format": "float8_e4m3fn"}}


def convert_quantised(
    source: ModelSource,
    out: str | Path,
    kind: PackedKind,
    encoder_only: bool = False,
    subfolder: str = "",
    tokenizer: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes a checkpoint as one file whose projections are quantised, and its table of embeddings.

    Args:
        source, out, encoder_only, subfolder, tokenizer, progress: see :func:`nai_t5_core.weights.convert.convert`.
        kind: one of :data:`nai_t5_core.backends.quantised.packing.PACKED_KINDS`. The table of embeddings is in q8_0
            where projections are in q4_k, as are weights whose rows are no whole blocks of q4_k, and is left as it is
            beside float8.

    Raises:
        CheckpointError: the source is unusable, a weight is not finite or beyond its kind (rows of the embedding table
            that are not finite are written as zeros), or the file cannot be written; then no file is left behind.
        ValueError: an unknown kind, or rows that are no whole blocks of it.
    """
    refuse_kind(kind)
    out = Path(out)
    examination = examine(source, subfolder)
    if not encoder_only:
        settle_head(examination)
        examination.faults += decoder_faults(examination)
    examination.refuse_faults()
    if out.resolve() in {info.file.resolve() for info in examination.checkpoint.tensors.values()}:
        raise CheckpointError(f"{out} is the source itself; write to another file")
    config = examination.config.encoder_only() if encoder_only else examination.config
    shapes = encoder_tensors(config) | decoder_tensors(config)
    refuse_scales(examination, shapes)
    kinds = {name: _kind_of(name, shape, kind) for name, shape in shapes.items()}
    found = load_tokenizer(tokenizer) if tokenizer is not None else find_tokenizer(examination)
    vocabulary = vocabulary_tensor(found.serialized()) if found is not None else {}

    layout: dict[str, tuple[torch.dtype, Shape]] = {}
    for name, shape in shapes.items():
        layout |= _layout(name, shape, kinds[name], examination)
    layout |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in vocabulary.items()}
    total = sum(dtype.itemsize * int(torch.Size(shape).numel()) for dtype, shape in layout.values())
    read = HashingReader(examination.read)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        written = 0
        for name in shapes:
            for full, tensor in _tensors(name, read(name), kinds[name]):
                yield full, tensor
                written += tensor.nbytes
            if progress is not None:
                progress(written, total)
        yield from vocabulary.items()

    def metadata() -> dict[str, str]:
        return native.quantised_header(config, examination.checkpoint.source, read.hexdigest())

    write_safetensors(out, layout, tensors(), metadata)
    return Conversion(out, kind, len(layout), total, read.hexdigest(), found.kind if found else None)


def _kind_of(name: str, shape: Shape, kind: PackedKind) -> PackedKind | None:
    """In which kind a tensor is written; None as it is.

    Raises:
        ValueError: its rows are no whole blocks.
    """
    if len(shape) != 2 or "relative_attention_bias" in name:
        return None
    if name == "shared.weight" and kind == "float8":
        return None
    # The table and the head, and rows that are no whole blocks of 256.
    is_odd = kind == "q4_k" and (shape[1] % 256 != 0 or not name.startswith(("encoder.", "decoder.")))
    chosen: PackedKind = "q8_0" if is_odd else kind
    try:
        packed_layout(chosen, (shape[0], shape[1]))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return chosen


def _layout(
    name: str, shape: Shape, kind: PackedKind | None, examination: Examination
) -> dict[str, tuple[torch.dtype, Shape]]:
    if kind is None:
        return {name: (_dtype_of(name, examination), shape)}
    parts: Layout = packed_layout(kind, (shape[0], shape[1]))
    module = name.removesuffix(".weight")
    named: dict[str, tuple[torch.dtype, Shape]] = {
        _named(module, part, kind): (dtype, tuple(size)) for part, (size, dtype) in parts.items()
    }
    note = _note(kind)
    return named if note is None else {**named, f"{module}.comfy_quant": (torch.uint8, tuple(note.shape))}


def _tensors(name: str, tensor: Tensor, kind: PackedKind | None) -> Iterator[tuple[str, Tensor]]:
    if kind is None:
        yield name, tensor.float() if _in_float32(name) else tensor.to(_wide(tensor.dtype))
        return
    module = name.removesuffix(".weight")
    for part, values in _packed(name, tensor.float(), kind).parts.items():
        yield _named(module, part, kind), values
    note = _note(kind)
    if note is not None:
        yield f"{module}.comfy_quant", note


def _packed(name: str, weight: Tensor, kind: PackedKind) -> QuantisedWeight:
    """A weight [rows, columns] float32 in a kind. Rows of the table that are not finite become zeros: files have them
    for tokens that no prompt has, and one number of theirs would spoil a scale.

    Raises:
        CheckpointError: another weight is not finite, or the kind has no scale for it.
    """
    is_sound = weight.isfinite().all(dim=1)
    if not is_sound.all():
        rows = (~is_sound).nonzero().flatten().tolist()
        if name != "shared.weight":
            raise CheckpointError(
                f"{name} holds NaN or infinity, in {len(rows)} rows of which the first is {rows[0]}; the weights are "
                "damaged: fetch them again"
            )
        log.warning(
            "%d rows of %s hold NaN or infinity, such as %d; they are written as zeros", len(rows), name, rows[0]
        )
        weight = torch.where(is_sound[:, None], weight, 0)
    packed = pack(weight, kind)
    fault = packed.fault()
    if fault is not None:
        raise CheckpointError(
            f"{name} reaches {weight.abs().max():.3g}, which {kind} cannot hold ({fault}); take another kind"
        )
    return packed


def _named(module: str, part: str, kind: PackedKind) -> str:
    """What a part of a module's weight is called in the file."""
    found = KINDS[kind]
    return f"{module}.{part}.{found.name}" if isinstance(found, BlockKind) else f"{module}.{part}"


def _dtype_of(name: str, examination: Examination) -> torch.dtype:
    if _in_float32(name):
        return torch.float32
    if examination.is_native:
        return torch.float32  # what is taken out of a fused tensor
    return _wide(examination.checkpoint.tensors[examination.keymap.names[name]].dtype)


def _in_float32(name: str) -> bool:
    return "layer_norm" in name


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype that every program can read."""
    return dtype if dtype.itemsize > 1 and dtype.is_floating_point else torch.float32


def _note(kind: PackedKind) -> Tensor | None:
    return torch.tensor(list(json.dumps(_NOTES[kind]).encode()), dtype=torch.uint8) if kind in _NOTES else None
