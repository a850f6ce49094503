"""Any checkpoint to our own single file, tensor by tensor, so that memory holds one of them at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nai_t5_core.facts.config import Shape
from nai_t5_core.facts.scales import StackScales
from nai_t5_core.model.precision import DTYPES
from nai_t5_core.tokenizer import TOKENIZER_TENSORS, load_tokenizer
from nai_t5_core.weights import native
from nai_t5_core.weights.chosen import ScalesChoice
from nai_t5_core.weights.examine import Examination, ModelSource, decoder_faults, examine, find_tokenizer, settle_head
from nai_t5_core.weights.formats import CheckpointError, tensor_bytes, write_safetensors
from nai_t5_core.weights.fuse import cook, fused_recipes, originals
from nai_t5_core.weights.held_weights import refuse_scales
from nai_t5_core.weights.load import choose_decoder_scales, choose_scales
from nai_t5_core.weights.ranges import refuse_infinities


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote; ``dtype`` is a kind where it is quantised."""

    out: Path
    dtype: torch.dtype | str
    tensors: int
    nbytes: int
    source_sha256: str
    tokenizer: str | None


def convert(
    source: ModelSource,
    out: str | Path,
    dtype: str = "auto",
    encoder_only: bool = False,
    subfolder: str = "",
    tokenizer: str | Path | None = None,
    scales: ScalesChoice = "auto",
    progress: Callable[[int, int], None] | None = None,
    decoder_scales: ScalesChoice = "auto",
) -> Conversion:
    """Writes a checkpoint as one file with fused tensors, config and tokenizer.

    Args:
        source, subfolder: as for :func:`nai_t5_core.weights.load.load_encoder`.
        out: the file to write; it appears when it is complete.
        dtype: of the weights; ``"auto"`` keeps the source's (bfloat16 for float8 and for blocks).
        encoder_only: leave the decoder out.
        tokenizer: a tokenizer file or folder to put in, where the source has none.
        scales, decoder_scales: as for :func:`nai_t5_core.weights.load.load_t5`; they are kept in the file.
        progress: called with (bytes written, bytes in all) after every tensor.

    Raises:
        CheckpointError: the source is unusable, or the file cannot be written; then no file is left behind.
        ValueError: unknown dtype.
    """
    out = Path(out)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    examination = examine(source, subfolder)
    if not encoder_only:
        settle_head(examination)
        examination.faults += decoder_faults(examination)
    config = examination.config.encoder_only() if encoder_only else examination.config
    examination.refuse_faults()
    if out.resolve() in {info.file.resolve() for info in examination.checkpoint.tensors.values()}:
        raise CheckpointError(f"{out} is the source itself; write to another file")

    model_dtype = main_dtype(examination) if dtype == "auto" else DTYPES[dtype]
    chosen = choose_scales(examination, model_dtype, scales)
    if decoder_scales == "auto" and not isinstance(scales, StackScales):
        decoder_scales = scales
    chosen_for_decoder = None if encoder_only else choose_decoder_scales(examination, model_dtype, decoder_scales)
    recipes = fused_recipes(config, chosen, chosen_for_decoder)
    refuse_scales(examination, originals(recipes))
    layout: dict[str, tuple[torch.dtype, Shape]] = {
        recipe.target: (recipe.dtype(model_dtype), recipe.shape) for recipe in recipes
    }
    found = load_tokenizer(tokenizer) if tokenizer is not None else find_tokenizer(examination)
    vocabulary = vocabulary_tensor(found.serialized()) if found is not None else {}
    layout |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in vocabulary.items()}

    read = HashingReader(examination.read)
    total = sum(dtype.itemsize * int(torch.Size(shape).numel()) for dtype, shape in layout.values())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        written = 0
        for recipe in recipes:
            tensor = cook(recipe, read, model_dtype)
            refuse_infinities(recipe, tensor, examination.read)
            yield recipe.target, tensor
            written += tensor.nbytes
            if progress is not None:
                progress(written, total)
        yield from vocabulary.items()

    def provenance() -> tuple[str, str]:
        """Name and hash of the original, also where it is converted a second time."""
        kept = examination.checkpoint.metadata if examination.is_native else {}
        return kept.get("source", examination.checkpoint.source), kept.get("source_sha256", read.hexdigest())

    write_safetensors(out, layout, tensors(), lambda: native.header(config, *provenance(), chosen, chosen_for_decoder))
    return Conversion(out, model_dtype, len(layout), total, provenance()[1], found.kind if found else None)


class HashingReader:
    """Reads tensors and hashes their names, dtypes, shapes and bytes on the way.

    A norm counts twice, as it is read twice: for the product with its projection and for itself.
    """

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._read = read
        self._hash = hashlib.sha256()

    def __call__(self, name: str) -> Tensor:
        tensor = self._read(name)
        self._hash.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        self._hash.update(tensor_bytes(tensor))
        return tensor

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def main_dtype(examination: Examination) -> torch.dtype:
    """The dtype of most weights; bfloat16 for float8, since folding the norms in would round them a second time.

    For the blocks of a GGUF file as well: their own rounding is coarser.
    """
    counts = examination.dtypes
    main = max(counts, key=lambda dtype: counts[dtype])
    return main if isinstance(main, torch.dtype) and main in DTYPES.values() else torch.bfloat16


def vocabulary_tensor(serialized: tuple[str, bytes]) -> dict[str, Tensor]:
    """A tokenizer as the tensor that stands for it in our files; none where there is no name for its kind."""
    kind, content = serialized
    name = next((name for name, stored in TOKENIZER_TENSORS.items() if stored == kind), None)
    return {} if name is None else {name: torch.frombuffer(bytearray(content), dtype=torch.uint8)}
