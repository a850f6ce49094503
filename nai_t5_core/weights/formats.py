"""Checkpoints as named lazy tensors, recognised by their content and not by their file name.

Nothing here knows T5: names, shapes, dtypes and bytes only. Reading one tensor maps its file for as long as the tensor
lives, so that a whole checkpoint is never in memory twice.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nai_t5_core.facts.config import Shape
from nai_t5_core.facts.nested_text import parse_object
from nai_t5_core.facts.paths import user_path
from nai_t5_core.weights.safetensors_files import DTYPE_NAMES, read_safetensors_header
from nai_t5_core.weights.shards import index_of, shard_count
from nai_t5_core.weights.whole_files import remove_unfinished, replacing

# What a folder's weights are called, the preferred first. A single file goes before an index: the hub's folders often
# have the index of a second, sharded form that was never downloaded.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "*.safetensors.index*.json",
    "*.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "*.gguf",
)
# A file of such a name is a whole model of the Hugging Face layout: config.json and tokenizer beside it belong to it.
_WHOLE_MODELS = ("model.safetensors", "pytorch_model.bin")
# The beginning of such a file, and of what its format is called.
GGUF = "GGUF"
# How the vocabulary in the metadata of a GGUF file is called among its tensors: as in ComfyUI's files.
GGUF_VOCABULARY = "spiece_model"
# Tensors start at multiples of this many bytes in the files we write, so that a mapped tensor suits vector loads.
_ALIGNMENT = 64


class CheckpointError(ValueError):
    """A checkpoint cannot be read or is not what it should be; the message says which, why, and what to do."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: Shape
    dtype: torch.dtype
    file: Path
    packing: str = ""
    """The name of the blocks that its numbers are packed in, such as Q8_0; ``dtype`` is then what they are read as."""
    start: int | None = None
    """The byte of the file that it begins at, where that is known."""


@dataclass
class Checkpoint:
    """An opened checkpoint. ``read`` gives one tensor on the CPU, in the dtype of the file, or unpacked."""

    source: str
    format: str
    tensors: dict[str, TensorInfo]
    read: Callable[[str], Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    """The folder that may hold config.json and a tokenizer; None for a lone file."""
    others: dict[str, str] = field(default_factory=dict)
    """Entries that torch has no tensor for, and what they are. Whether one is needed is for others to say."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Tensors that ``read`` cannot unpack, and why."""
    config_values: dict[str, float] = field(default_factory=dict)
    """What a header without a whole config tells of one, by the names in :class:`nai_t5_core.facts.config.T5Config`."""
    map_blocks: Callable[[str], Tensor] | None = None
    """Gives the bytes of a tensor that is packed, [rows, bytes of a row], as they lie in the file."""

    def as_it_lies(self, name: str) -> Tensor:
        """One tensor as it lies in the file, mapped where the format allows; blocks as bytes [rows, bytes of a row]."""
        if self.tensors[name].packing:
            assert self.map_blocks is not None, f"{name} has no blocks"
            return self.map_blocks(name)
        return self.read(name)

    def read_only_by(self, read: Callable[[str], Tensor]) -> None:
        """Reads tensors in another way from now on; what the ways until now have held is let go."""
        self.read, self.map_blocks = read, None

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: info.shape for name, info in self.tensors.items()}

    def hf_config(self) -> dict[str, Any] | None:
        """The config.json beside the weights, or None where there is none."""
        path = self.folder / "config.json" if self.folder else None
        return _read_json(path) if path and path.is_file() else None


def open_checkpoint(path: str | Path, subfolder: str = "") -> Checkpoint:
    """Opens a file or folder: safetensors or PyTorch, single or sharded, or GGUF.

    Raises:
        CheckpointError: nothing at the path, no weights in the folder, or a file that is damaged or of another kind.
    """
    path = user_path(path) / subfolder
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.is_file():
            return _open_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    raise CheckpointError(
        f"{path} does not exist; give a weight file, a folder, or a hub id such as google/t5-v1_1-xxl"
    )


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / "model_index.json").is_file():
        encoders = sorted(path.name for path in folder.glob("text_encoder*"))
        raise CheckpointError(
            f"{folder} is a whole pipeline; give the subfolder of its T5 text encoder ({', '.join(encoders) or 'none'})"
        )
    weights = _weights_in(folder)
    if weights is None:
        raise CheckpointError(
            f"{folder} holds no weights (looked for *.safetensors, pytorch_model.bin, their index files and *.gguf); "
            "give the folder or the file that has them"
        )
    checkpoint = _open_file(weights)
    checkpoint.source = str(folder)
    checkpoint.folder = folder
    return checkpoint


def _weights_in(folder: Path) -> Path | None:
    for pattern in _WEIGHT_FILES:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        are_shards = len(found) > 1 and all(shard_count(file) > 1 for file in found)
        if are_shards and pattern == "*.gguf":  # no index lists them; the first one says what to do
            return found[0]
        if are_shards:
            raise CheckpointError(
                f"{folder} holds {len(found)} of {shard_count(found[0])} shards ({found[0].name}, …) without the index "
                f"that lists them; fetch the *.index.json of the same model as well"
            )
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:5])
            more = f" and {len(found) - 5} more" if found[5:] else ""
            raise CheckpointError(
                f"{folder} holds {len(found)} weight files and no model.safetensors ({names}{more}); name one of them"
            )
        if found:
            return found[0]
    return None


def _open_file(path: Path) -> Checkpoint:
    head = _head(path)
    if head.lstrip()[:1] == b"{" and not _is_safetensors(head):
        return _open_index(path)
    if not is_gguf(path):  # which says itself whether it is a part, whatever its name
        _refuse_single_shard(path)
    checkpoint = _open_weights(path)
    if path.name in _WHOLE_MODELS:
        checkpoint.folder = path.parent
    return checkpoint


def _refuse_single_shard(path: Path) -> None:
    count = shard_count(path)
    if count == 1:
        return
    index = index_of(path)
    advice = f"give their index {index}, or the folder" if index else "the index that lists them is not beside it"
    raise CheckpointError(f"{path} is one of {count} shards of a checkpoint; {advice}")


def _open_weights(path: Path) -> Checkpoint:
    head = _head(path)
    if _is_safetensors(head):
        return _open_safetensors(path)
    if head[:2] in (b"PK", b"\x80\x02"):
        return _open_pytorch(path)
    if is_gguf(path):
        return _open_gguf(path)
    raise CheckpointError(
        f"{path} is neither safetensors, nor a PyTorch or GGUF file, nor a shard index (it begins with {head[:8]!r}); "
        "it may be damaged or still downloading"
    )


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{"


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF by its first bytes, whatever it is called."""
    return _head(path).startswith(GGUF.encode())


def _open_safetensors(path: Path) -> Checkpoint:
    try:
        header = read_safetensors_header(path)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error
    tensors = {name: TensorInfo(shape, dtype, path, start=at) for name, (shape, dtype, at) in header.tensors.items()}

    def read(name: str) -> Tensor:
        # A handle for each tensor: its mapping ends with the tensor, and memory holds only what is in use.
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    return Checkpoint(str(path), "safetensors", tensors, read, header.metadata, others=header.others)


def _open_gguf(path: Path) -> Checkpoint:
    # Imported for such files alone: it needs numpy and the tokenizers' formats.
    from nai_t5_core.weights.gguf_files import open_gguf

    try:
        file = open_gguf(path)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error
    placed = file.tensors.items()
    infos = {name: TensorInfo(at.shape, at.dtype, path, at.kind.packing, at.start) for name, at in placed}
    vocabulary = {} if file.vocabulary is None else {GGUF_VOCABULARY: file.vocabulary}
    infos |= {name: TensorInfo((len(content),), torch.uint8, path) for name, content in vocabulary.items()}

    def read(name: str) -> Tensor:
        if name in vocabulary:
            return torch.frombuffer(bytearray(vocabulary[name]), dtype=torch.uint8)
        return file.tensors[name].read()

    unreadable = {name: tensor.kind.obstacle for name, tensor in file.tensors.items() if tensor.kind.obstacle}
    return Checkpoint(
        str(path),
        f"{GGUF} ({file.kinds})",
        infos,
        read,
        unreadable=unreadable,
        config_values=file.config,
        map_blocks=lambda name: file.tensors[name].mapped(),
    )


def _open_pytorch(path: Path) -> Checkpoint:
    from nai_t5_core.weights.pytorch_files import read_state

    try:
        state, others = read_state(path)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error
    tensors = {name: TensorInfo(tuple(value.shape), value.dtype, path) for name, value in state.items()}
    return Checkpoint(str(path), "PyTorch", tensors, state.__getitem__, others=others)


def _open_index(path: Path) -> Checkpoint:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} is a JSON file without a weight_map; give the weight file or its index")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path} is damaged: its weight_map gives something else than file names; fetch it again")
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (path.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{path} lists {len(names)} shards, of which {len(absent)} are absent: {', '.join(absent[:5])}; "
            "fetch them again"
        )
    shards = {name: _open_weights(path.parent / name) for name in names}
    others = {name: kind for shard in shards.values() for name, kind in shard.others.items()}
    unreadable = {name: reason for shard in shards.values() for name, reason in shard.unreadable.items()}
    lost = [name for name, shard in weight_map.items() if name not in shards[shard].tensors and name not in others]
    if lost:
        raise CheckpointError(
            f"{path} promises tensors that its shards do not hold: {', '.join(lost[:5])}; fetch both again"
        )

    def read(name: str) -> Tensor:
        return shards[weight_map[name]].read(name)

    tensors = {name: shards[shard].tensors[name] for name, shard in weight_map.items() if name not in others}
    kind = shards[names[0]].format
    form = f"sharded {kind}, {len(names)} files"
    checkpoint = Checkpoint(str(path), form, tensors, read, folder=path.parent, others=others, unreadable=unreadable)
    checkpoint.map_blocks = lambda name: shards[weight_map[name]].as_it_lies(name)
    return checkpoint


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_safetensors(
    path: str | Path,
    layout: Mapping[str, tuple[torch.dtype, Shape]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | Callable[[], Mapping[str, str]],
) -> None:
    """Writes a safetensors file tensor by tensor, so that memory holds one of them at a time.

    Args:
        path: the file; it appears when it is complete.
        layout: dtype and shape of every tensor, known before any is made.
        tensors: the tensors in the order of ``layout``.
        metadata: strings for the header; a function is called after the last tensor, and its result must be no longer
            than :data:`METADATA_ROOM` allows.

    Raises:
        CheckpointError: the disk has too little room, or the file cannot be written. No file is left behind.
    """
    path = Path(path)
    header, total = _header(layout)
    begin = {} if callable(metadata) else dict(metadata)
    try:
        _check_room(path, total)
        with replacing(path) as partial, partial.open("wb") as file:
            room = _encoded({**header, "__metadata__": begin}, room=METADATA_ROOM if callable(metadata) else 0)
            file.write(room)
            _write_tensors(file, layout, tensors)
            if callable(metadata):
                file.seek(0)
                file.write(_encoded({**header, "__metadata__": dict(metadata())}, length=len(room)))
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error.strerror or error}") from error


# Bytes set aside in the header for metadata, which is complete only after the last tensor was hashed.
METADATA_ROOM = 16_384


def _header(layout: Mapping[str, tuple[torch.dtype, Shape]]) -> tuple[dict[str, Any], int]:
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape) in layout.items():
        size = dtype.itemsize * int(torch.Size(shape).numel())
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    return header, offset


def _encoded(header: dict[str, Any], room: int = 0, length: int | None = None) -> bytes:
    """The header as the format has it: its length as 8 bytes, then JSON, padded with spaces."""
    text = json.dumps(header, separators=(",", ":")).encode()
    if length is None:
        length = -(-(8 + len(text) + room) // _ALIGNMENT) * _ALIGNMENT
    assert 8 + len(text) <= length, "the metadata exceeds the room set aside for it"
    return struct.pack("<Q", length - 8) + text.ljust(length - 8)


def _write_tensors(
    file: Any, layout: Mapping[str, tuple[torch.dtype, Shape]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    for (name, (dtype, shape)), (given, tensor) in zip(layout.items(), tensors, strict=True):
        assert (given, tensor.dtype, tuple(tensor.shape)) == (name, dtype, shape), f"{given} does not fit its place"
        file.write(tensor_bytes(tensor))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor in row-major order; a view where the tensor is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def _check_room(path: Path, needed: int) -> None:
    folder = path.absolute().parent
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the name of the file to write in it")
    if not folder.is_dir():
        raise CheckpointError(f"{path} cannot be written: the folder {folder} does not exist")
    remove_unfinished(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{path} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "make room or write elsewhere"
        )
