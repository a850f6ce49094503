"""What a checkpoint is, before a weight is read: its config, where its tensors are, and all that is wrong with it.

All faults are found together, so that they can be told at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from nai_t5_core.backends.quantised.kinds import WEIGHT, QuantisedWeight
from nai_t5_core.facts.config import Shape, T5Config, config_from_hf, decoder_tensors, encoder_tensors
from nai_t5_core.facts.scales import StackScales
from nai_t5_core.model.precision import DTYPES, largest_finite
from nai_t5_core.tokenizer import TOKENIZER_TENSORS, ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_from_bytes
from nai_t5_core.weights import native, neighbours
from nai_t5_core.weights.formats import Checkpoint, CheckpointError, open_checkpoint
from nai_t5_core.weights.fuse import Recipe, fused_recipes, uncook_part
from nai_t5_core.weights.hub import find_model
from nai_t5_core.weights.inferred_config import infer_config, with_told
from nai_t5_core.weights.keymaps import KeyMap, map_names
from nai_t5_core.weights.quantised import Stored, find_quantised

# Faults in a message; where there are more, a wrong number of layers is behind them.
_SHOWN = 100
ModelSource = str | Path | None
_WEIGHT_DTYPES = (
    *DTYPES.values(),
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


@dataclass
class Examination:
    """What a checkpoint holds and what is wrong with it, before any tensor was read."""

    checkpoint: Checkpoint
    config: T5Config
    config_source: str
    keymap: KeyMap
    faults: list[str] = field(default_factory=list)
    quantised: dict[str, Stored] = field(default_factory=dict)
    """The weights that are quantised in the file, by their Hugging Face names."""

    @property
    def is_native(self) -> bool:
        return native.is_native(self.checkpoint)

    @property
    def dtypes(self) -> dict[torch.dtype | str, int]:
        """Number of weights of each dtype, or of each quantised kind by its name, among the tensors of the T5."""
        counts: dict[torch.dtype | str, int] = {}
        for name, full in self.keymap.names.items():
            info, stored = self.checkpoint.tensors[full], self.quantised.get(name)
            kind: torch.dtype | str = info.packing or info.dtype
            if stored is not None and not stored.kind.name.startswith("float8"):
                kind = stored.kind.name
            counts[kind] = counts.get(kind, 0) + int(torch.Size(self.shape(name)).numel())
        return counts

    def shape(self, name: str) -> Shape:
        """The shape of a tensor of the T5; of a quantised weight, that of its numbers."""
        stored = self.quantised.get(name)
        return self.checkpoint.tensors[self.keymap.names[name]].shape if stored is None else stored.shape

    def quantised_weight(self, name: str) -> QuantisedWeight:
        """A quantised weight as it lies in the file, by its Hugging Face name."""
        return self.quantised[name].weight(self.checkpoint)

    @property
    def encoder_bytes(self) -> int:
        """What the encoder takes in memory as it lies; weights that are not quantised have two bytes for a number."""
        shapes = encoder_tensors(self.config)
        kept = {name: self.quantised.get(name) for name in shapes}
        return sum(
            2 * int(torch.Size(shapes[name]).numel()) if stored is None else stored.nbytes(self.checkpoint)
            for name, stored in kept.items()
        )

    @cached_property
    def _original_shapes(self) -> dict[str, Shape]:
        return encoder_tensors(self.config) | decoder_tensors(self.config)

    def refuse_faults(self) -> None:
        """Raises a CheckpointError that lists the faults, if there are any: all of them, or the first hundred."""
        if self.faults:
            more = [f"and {len(self.faults) - _SHOWN} more"] if len(self.faults) > _SHOWN else []
            listed = "\n".join(f"  - {fault}" for fault in self.faults[:_SHOWN] + more)
            number = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
            raise CheckpointError(f"{self.checkpoint.source} cannot be loaded, {number}:\n{listed}")

    @cached_property
    def scales(self) -> StackScales | None:
        """The scales that the weights of a file of our own hold; None where nothing is scaled."""
        return self._native_scales("encoder", self.config.num_layers)

    @cached_property
    def decoder_scales(self) -> StackScales | None:
        """The same of the decoder."""
        return self._native_scales("decoder", self.config.num_decoder_layers)

    def _native_scales(self, stack: Literal["encoder", "decoder"], layers: int) -> StackScales | None:
        scales = native.read_scales(self.checkpoint, stack) if self.is_native else None
        if scales is not None and len(scales.layers) != layers:
            raise CheckpointError(
                f"{self.checkpoint.source} has a damaged header: scales for {len(scales.layers)} layers, and its "
                f"{stack} has {layers}; convert the original again"
            )
        return scales

    @cached_property
    def _fused_home(self) -> dict[str, Recipe]:
        """Hugging Face name to the recipe of the fused tensor that holds it, in a file of our own."""
        recipes = fused_recipes(self.config, self.scales, self.decoder_scales)
        return {part: recipe for recipe in recipes for part in recipe.parts}

    def read(self, name: str) -> Tensor:
        """One tensor by its Hugging Face name.

        A quantised weight comes unpacked, in float32, unless it is float8 without a scale. From a fused file of our
        own, the original is taken out of its fused tensor, in float32 and exact to a rounding or two.
        """
        if self.is_native:
            return uncook_part(self._fused_home[name], name, self.checkpoint.read, self._original_shapes)
        stored = self.quantised.get(name)
        if stored is not None and not stored.is_plain_float8:
            return stored.weight(self.checkpoint).plain()
        tensor = self.checkpoint.read(self.keymap.names[name])
        if name not in self.keymap.scales:
            return tensor
        scale = self.checkpoint.read(self.keymap.scales[name]).float()
        if scale.ndim == 1:  # one for each row, or for all
            scale = scale.reshape(-1, *[1] * (tensor.ndim - 1))
        return tensor.float() * scale

    def largest(self, name: str) -> float:
        """The largest absolute finite value of a tensor, of which little is in memory at a time."""
        if name not in self.quantised:
            return largest_finite(self.read(name))
        weight = self.quantised_weight(name)
        return max(largest_finite(weight.rows(rows)) for rows in weight.slices())


def examine(source: ModelSource = None, subfolder: str = "") -> Examination:
    """Opens a checkpoint and checks names, sizes and shapes against each other, without reading a weight.

    Raises:
        CheckpointError: there is no readable checkpoint, or no T5 in it.
    """
    path = find_model(source, subfolder)
    try:
        return examine_checkpoint(open_checkpoint(path))
    except CheckpointError as error:
        raise CheckpointError(f"{error}{neighbours.advice(path)}") from error


def examine_checkpoint(checkpoint: Checkpoint) -> Examination:
    """The same for a checkpoint that is open already."""
    if native.is_native(checkpoint):
        config = native.read_config(checkpoint)
        expected = {recipe.target: recipe.shape for recipe in fused_recipes(config)}
        examination = Examination(checkpoint, config, "its own header", native.keymap(checkpoint, expected))
        examination.faults += _shape_faults(examination, expected, "its own header")
        examination.faults += _unknown_faults(examination)
        return examination

    keymap = map_names(checkpoint.tensors, checkpoint.source)
    quantised = find_quantised(checkpoint, keymap)
    keymap.ignored |= checkpoint.others
    _place_parts(keymap, quantised)
    shapes = {name: checkpoint.tensors[full].shape for name, full in keymap.names.items()}
    shapes |= {name: stored.shape for name, stored in quantised.items()}
    try:
        config, config_source = _config(checkpoint, shapes)
    except ValidationError as error:
        raise CheckpointError(f"{checkpoint.source}: {error.errors()[0]['msg']}") from error
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.source}: {error}") from error
    if not any(name.startswith("decoder.") for name in keymap.names):
        config = config.encoder_only()
    examination = Examination(checkpoint, config, config_source, keymap, quantised=quantised)
    examination.faults += _kind_faults(examination)
    examination.faults += _shape_faults(examination, encoder_tensors(config), config_source)
    examination.faults += _surplus_faults(examination)
    examination.faults += _unknown_faults(examination)
    examination.faults += _number_faults(examination)
    return examination


def _place_parts(keymap: KeyMap, quantised: dict[str, Stored]) -> None:
    """Takes what stands for quantised weights, or beside them, off the tensors that no T5 has."""
    parts = {full for stored in quantised.values() for full in stored.parts.values()}
    beside = {full for stored in quantised.values() for full in stored.beside}
    for name, stored in quantised.items():
        keymap.names.setdefault(name, stored.parts[WEIGHT])
    keymap.unknown = [full for full in keymap.unknown if full not in parts | beside]
    keymap.ignored |= dict.fromkeys(sorted(beside), "says how a weight is quantised")


def _config(checkpoint: Checkpoint, shapes: dict[str, Shape]) -> tuple[T5Config, str]:
    """The config of a checkpoint, and where it comes from.

    Raises:
        ValueError: what is there makes no config.
    """
    if native.is_quantised(checkpoint):
        return native.read_config(checkpoint), "its own header"
    hf_config = checkpoint.hf_config()
    if hf_config is not None:
        return config_from_hf(hf_config), "config.json"
    inferred = infer_config(shapes)
    if not checkpoint.config_values:
        return inferred, "the tensors"
    return with_told(inferred, checkpoint.config_values), "the tensors and metadata"


def decoder_faults(examination: Examination) -> list[str]:
    """What is wrong with the decoder's tensors, which :func:`examine` leaves aside unless the file is our own."""
    if examination.is_native:
        return []
    return list(_shape_faults(examination, decoder_tensors(examination.config), examination.config_source))


def settle_head(examination: Examination) -> None:
    """Looks whether the output head is the embedding again, where only its numbers tell.

    A config may say that the head is tied beside a file that has one: transformers 5 writes so into every file. Where
    that is a copy it is left out; else it is the head, as transformers 5 has it, and the outputs are scaled as the
    config says. Where it does not say (UMT5's and mT5's up to 5.23), they are scaled without a gate, as v1.0 was
    trained, and not scaled with one. Leaves a checkpoint with faults alone.
    """
    names, config = examination.keymap.names, examination.config
    if examination.faults or not config.tie_word_embeddings or "lm_head.weight" not in names:
        return
    if _are_the_same(examination.read("lm_head.weight"), examination.read("shared.weight")):
        examination.keymap.ignored[names.pop("lm_head.weight")] = "a copy of the embedding, shared.weight"
    else:
        scaled = config.scale_decoder_outputs
        if scaled is None and not config.gated:
            scaled = True
        own_head = {"tie_word_embeddings": False, "scale_decoder_outputs": scaled}
        examination.config = config.model_copy(update=own_head)


def _are_the_same(tensor: Tensor, other: Tensor) -> bool:
    """To the bit; of any dtype."""
    alike = tensor.dtype == other.dtype and tensor.shape == other.shape
    return alike and torch.equal(tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _shape_faults(examination: Examination, expected: dict[str, tuple[int, ...]], config_source: str) -> Iterator[str]:
    keymap = examination.keymap
    unreadable = {keymap.hf_name(full): what for full, what in examination.checkpoint.others.items()}
    for name, shape in expected.items():
        if name not in keymap.names:
            found = f"is {unreadable[name]}" if name in unreadable else "is missing"
            yield f"{name} {found} (expected {list(shape)} according to {config_source})"
            continue
        shape_found = examination.shape(name)
        if shape_found != shape:
            yield f"{name} has shape {list(shape_found)}, but {config_source} asks for {list(shape)}"


def _surplus_faults(examination: Examination) -> Iterator[str]:
    known = encoder_tensors(examination.config)
    for name in examination.keymap.names:
        if name.startswith("encoder.") and name not in known:
            yield f"{name} is in the file, but {examination.config_source} describes a model without it"


def _unknown_faults(examination: Examination) -> Iterator[str]:
    unknown = examination.keymap.unknown
    if unknown:
        shown = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if unknown[8:] else "")
        yield f"tensors that no T5 has: {shown}"


def _kind_faults(examination: Examination) -> Iterator[str]:
    """Quantised weights whose parts are missing, or are not what their kind needs."""
    for name, stored in examination.quantised.items():
        if fault := stored.fault(examination.checkpoint):
            yield f"{name} cannot be read as {stored.kind.name}: {fault}"


def _number_faults(examination: Examination) -> Iterator[str]:
    """Weights whose numbers mean something else than what they say, and scales that belong to no weight."""
    tensors, names = examination.checkpoint.tensors, examination.keymap.names
    for name, full in names.items():
        dtype = tensors[full].dtype
        if dtype not in _WEIGHT_DTYPES and name not in examination.quantised:
            yield f"{name} is {dtype}: a weight of this type can be read only with its scales beside it"
    for name, full in examination.keymap.scales.items():
        if name not in names:
            yield f"{full} is the scale of {name}, which is not in the file"
        elif name not in examination.quantised and tensors[full].shape not in _scale_shapes(tensors[names[name]].shape):
            shape = list(tensors[full].shape)
            yield f"{full} has shape {shape}; only one scale for a whole weight, or one for each row, can be read"


def _scale_shapes(shape: Shape) -> tuple[Shape, ...]:
    return (), (1,), shape[:1], (*shape[:1], 1)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer that belongs to the weights
# ---------------------------------------------------------------------------------------------------------------------


def find_tokenizer(examination: Examination) -> Tokenizer | None:
    """The tokenizer inside the weight file, in its folder, or in the pipeline's folder for it; None without one."""
    checkpoint, inside = examination.checkpoint, examination.keymap.tokenizer
    # Tools that cast every tensor of a file to float16 make the tokenizer in it useless.
    if inside is not None and checkpoint.tensors[inside].dtype == torch.uint8:
        kind = TOKENIZER_TENSORS[inside.rpartition(".")[2]]
        return tokenizer_from_bytes(kind, bytes(checkpoint.read(inside).numpy()))
    folders = _tokenizer_folders(examination)
    if folders:
        return load_tokenizer(folders[0])
    return ByteTokenizer() if examination.config.kind == "ByT5" else None


def find_tokenizer_for(source: ModelSource, subfolder: str = "", tokenizer: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a model argument, or the one given.

    Raises:
        ValueError: there is none.
    """
    found = load_tokenizer(tokenizer) if tokenizer is not None else find_tokenizer(examine(source, subfolder))
    if found is None:
        raise ValueError(NO_TOKENIZER.format(source=source))
    return found


NO_TOKENIZER = (
    "{source} comes without a tokenizer; give a spiece.model or tokenizer.json, or the folder of one, as tokenizer "
    "(every T5 v1.0, v1.1 and FLAN model has the same)"
)


def _tokenizer_folders(examination: Examination) -> list[Path]:
    folder = examination.checkpoint.folder
    if folder is not None:
        # In a diffusers pipeline, text_encoder_2 goes with tokenizer_2.
        places = [folder, folder.parent / folder.name.replace("text_encoder", "tokenizer")]
    else:
        file = examination.checkpoint.tensors[examination.keymap.names["shared.weight"]].file
        places = [file.parent / beside for beside in [examination.keymap.naming.tokenizer] if beside]
    return [path for path in places if path.is_dir() and _has_tokenizer(path)]


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("*.model")) or any(folder.glob("tokenizer*.json"))
