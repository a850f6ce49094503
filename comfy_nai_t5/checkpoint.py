"""A T5 file in the names and spellings that the running ComfyUI loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfy_nai_t5.promised import Promised
from nai_t5_core.backends.quantised.kinds import QuantisedWeight
from nai_t5_core.backends.quantised.scaled import FLOAT8, SCALE, Scaled
from nai_t5_core.facts.config import Shape, T5Config, encoder_tensors
from nai_t5_core.model.precision import is_finite, keeps_finite
from nai_t5_core.tokenizer import JsonTokenizer, Tokenizer, tokenizer_json_to_sentencepiece
from nai_t5_core.weights import keymaps, native
from nai_t5_core.weights.examine import Examination, examine, find_tokenizer
from nai_t5_core.weights.formats import GGUF, CheckpointError, open_checkpoint
from nai_t5_core.weights.held_weights import refuse_scales
from nai_t5_core.weights.shards import index_of, shard_count

# What the numbers in blocks are kept in once they are unpacked: half of what they are exactly.
_UNPACKED = torch.float16


def holds_t5(path: str | Path) -> bool:
    """Whether there is a T5 in a file, under any prefix and in any spelling. One shard stands for all."""
    checkpoint = open_checkpoint(_whole(path))
    return native.is_native(checkpoint) or keymaps.holds_t5(checkpoint.tensors)


def _whole(path: str | Path) -> str | Path:
    """The index that lists a shard; any other path as it is."""
    return (index_of(path) if shard_count(path) > 1 else None) or path


@dataclass(frozen=True)
class ServerCheckpoint:
    """What ComfyUI needs of a file.

    Attributes:
        examination: what the file holds.
        state: the encoder's tensors under Hugging Face names, float8 with scales in the running server's spelling.
            Where weights stay quantised, no more than their shapes.
        model_options: what makes the server build modules that read those scales; empty for plain weights.
        quantised: the weights that stay quantised, under Hugging Face names.
        beside: the plain tensors beside these.
    """

    examination: Examination
    state: dict[str, Tensor]
    model_options: dict[str, Any]
    quantised: dict[str, QuantisedWeight] = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)

    @property
    def config(self) -> T5Config:
        return self.examination.config.encoder_only()

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return find_tokenizer(self.examination)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of most weights that are not quantised, or of those that come out of blocks."""
        counts: dict[torch.dtype, int] = {}
        for kind, count in self.examination.dtypes.items():
            dtype = kind if isinstance(kind, torch.dtype) else _UNPACKED
            counts[dtype] = counts.get(dtype, 0) + count
        plain = {dtype: count for dtype, count in counts.items() if dtype.itemsize > 1}
        return max(plain, key=plain.__getitem__) if plain else torch.float32


def sentencepiece_tensor(tokenizer: Tokenizer) -> Tensor:
    """A tokenizer as the SentencePiece model that some of ComfyUI's classes want, uint8 [bytes].

    Raises:
        ValueError: it is of a kind that no SentencePiece model can stand for.
    """
    kind, content = tokenizer.serialized()
    if kind == JsonTokenizer.kind:
        content = tokenizer_json_to_sentencepiece(content)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def read_checkpoint(path: str | Path | None, unpack: bool = False) -> ServerCheckpoint:
    """Opens a T5 file of any form that :mod:`nai_t5_core` reads; None is the embedded model.

    One shard stands for all.

    Args:
        unpack: make float16 numbers of quantised weights, but of the float8 that ComfyUI itself keeps.

    Raises:
        CheckpointError: a ValueError that says all that is wrong with the file, and what to give instead.
    """
    examination = examine(_whole(path) if path else None)
    examination.refuse_faults()
    names = encoder_tensors(examination.config.encoder_only())
    refuse_scales(examination, list(names))
    if not unpack and _stays_quantised(examination):
        return _staying(examination, names)
    scales = {name: full for name, full in examination.keymap.scales.items() if name in names}
    # Other kinds with scales come unpacked.
    scales = {name: full for name, full in scales.items() if not _is_unpacked(name, examination)}
    if not scales:
        read = examination.read if examination.is_native else _reader(examination)
        return ServerCheckpoint(examination, {name: read(name) for name in names}, {})
    return _with_scales(examination, list(names), scales)


def whole(path: str | Path | None) -> str | Path | None:
    """The index that lists a shard; any other path as it is."""
    return _whole(path) if path else None


def checkpoint_without_weights(path: str | Path | None, unpack: bool = False) -> ServerCheckpoint:
    """As :func:`read_checkpoint`, with tensors that have a shape and a dtype and no numbers; none is read.

    Raises:
        CheckpointError: as :func:`read_checkpoint`.
    """
    examination = examine(whole(path))
    examination.refuse_faults()
    names = encoder_tensors(examination.config.encoder_only())
    if not unpack and _stays_quantised(examination):
        return _staying(examination, names, torch.device("meta"))
    if examination.keymap.scales:
        checkpoint = read_checkpoint(path, unpack)  # mapped from the file; only the scales are read
        state = {name: emptied(tensor) for name, tensor in checkpoint.state.items()}
        return ServerCheckpoint(examination, state, checkpoint.model_options)

    def dtype_of(name: str) -> torch.dtype:
        is_unpacked = not examination.is_native and _is_unpacked(name, examination)
        return _UNPACKED if is_unpacked else _dtype(name, examination)

    state = {name: torch.empty(shape, dtype=dtype_of(name), device="meta") for name, shape in names.items()}
    return ServerCheckpoint(examination, state, {})


def emptied(tensor: Tensor) -> Tensor:
    """A tensor without its numbers, unless these are no weights but what ComfyUI reads of how weights are quantised."""
    return tensor if tensor.dtype == torch.uint8 or not tensor.numel() else tensor.to("meta")


def _reader(examination: Examination) -> Callable[[str], Tensor]:
    """Reads a tensor by its Hugging Face name, as it is in the file; what is quantised there comes in float16."""
    checkpoint, names = examination.checkpoint, examination.keymap.names
    in_gguf = checkpoint.format.startswith(GGUF)

    def read(name: str) -> Tensor:
        if in_gguf or _is_unpacked(name, examination):
            return _unpacked(name, examination)
        return checkpoint.read(names[name])

    return read


def _is_unpacked(name: str, examination: Examination) -> bool:
    """Whether a weight is of a kind that ComfyUI's own modules are not given as it is in the file."""
    stored = examination.quantised.get(name)
    if stored is None:
        return bool(examination.checkpoint.tensors[examination.keymap.names[name]].packing)
    return not _is_of_comfyui(name, examination)


def _is_of_comfyui(name: str, examination: Examination) -> bool:
    """Whether ComfyUI's own modules keep a quantised weight as it is: float8 without a scale, or with one for all."""
    stored = examination.quantised[name]
    kind = stored.kind
    scale = examination.checkpoint.tensors[stored.parts[SCALE]].shape if SCALE in stored.parts else ()
    is_float8 = isinstance(kind, Scaled) and kind.dtype in FLOAT8 and kind.block is None
    return is_float8 and torch.Size(scale).numel() == 1


def _stays_quantised(examination: Examination) -> bool:
    """Whether an encoder has weights that stay quantised in modules of ours."""
    names = encoder_tensors(examination.config.encoder_only())
    return any(name in examination.quantised and not _is_of_comfyui(name, examination) for name in names)


def _staying(examination: Examination, names: dict[str, Shape], device: torch.device | None = None) -> ServerCheckpoint:
    """With all quantised weights as they lie in the file, mapped; on the meta device none is read."""
    state: dict[str, Tensor] = {name: Promised(shape, _UNPACKED) for name, shape in names.items()}
    # Tables of position biases are small, and read as a whole in every call.
    can_stay = [name for name in names if name in examination.quantised and "relative_attention_bias" not in name]
    quantised = {name: examination.quantised_weight(name) for name in can_stay}
    beside = [name for name in names if name not in quantised]
    if device is None:
        return ServerCheckpoint(examination, state, {}, quantised, {name: examination.read(name) for name in beside})
    quantised = {name: weight.to(device) for name, weight in quantised.items()}
    shapes = {name: torch.empty(names[name], dtype=_dtype(name, examination), device=device) for name in beside}
    return ServerCheckpoint(examination, state, {}, quantised, shapes)


def _dtype(name: str, examination: Examination) -> torch.dtype:
    """What a tensor that is not quantised comes in."""
    if examination.is_native:
        return torch.float32
    return examination.checkpoint.tensors[examination.keymap.names[name]].dtype


def _unpacked(name: str, examination: Examination) -> Tensor:
    """What the bytes of a quantised weight stand for, in half the memory that they exactly need; others as they are."""
    checkpoint = examination.checkpoint
    exact = examination.read(name)
    values = exact.to(_UNPACKED) if _is_unpacked(name, examination) else exact
    # Rows of the embedding that no prompt uses may be anything in the original.
    if not (keeps_finite(exact, values) if name == "shared.weight" else is_finite(values)):
        raise CheckpointError(
            f"{checkpoint.source} holds {name} beyond float16's range; use a safetensors file of the same model"
        )
    return values


def _with_scales(examination: Examination, names: list[str], scales: dict[str, str]) -> ServerCheckpoint:
    """Scaled float8, as it is in the file; ComfyUI multiplies by the scale in each layer."""
    import comfy.ops

    read = _reader(examination)
    state = {name: read(name) for name in names}
    is_old = hasattr(comfy.ops, "scaled_fp8_ops")  # before per-layer quantisation
    dtypes = {state[name].dtype for name in scales}
    if is_old and len(dtypes) > 1:
        raise CheckpointError(f"{examination.checkpoint.source} mixes {dtypes}; this ComfyUI is too old for that")
    if is_old and "shared.weight" in scales:
        state["shared.weight"] = examination.read("shared.weight")  # exact, since its embeddings take no scale
        del scales["shared.weight"]
    for name, full in scales.items():
        scale = examination.checkpoint.read(full).float()
        module = name.removesuffix(".weight")
        if is_old:
            state[f"{module}.scale_weight"] = scale.reshape(())
        else:
            state[f"{module}.weight_scale"] = scale.reshape(())
            description = json.dumps({"format": str(state[name].dtype).removeprefix("torch.")}).encode()
            state[f"{module}.comfy_quant"] = torch.frombuffer(bytearray(description), dtype=torch.uint8)
    if not is_old:
        return ServerCheckpoint(examination, state, {"quantization_metadata": {"mixed_ops": True}})
    dtype = dtypes.pop()
    state["scaled_fp8"] = torch.empty(0, dtype=dtype)
    return ServerCheckpoint(examination, state, {"scaled_fp8": dtype})
