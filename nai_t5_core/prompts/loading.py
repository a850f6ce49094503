"""How an encoder is loaded and made ready, at once or at the first prompt that is not kept."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

from nai_t5_core.backends.choose import (
    encode_on_cuda,
    prepack,
    quantize_int8,
    run_quantised,
    why_not_prepack,
)
from nai_t5_core.backends.quantised.projections import stays_quantised
from nai_t5_core.lora.files import Lora
from nai_t5_core.lora.loras import Loras
from nai_t5_core.lora.set import lora_of, refuse_misfits
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.precision import resolve_device
from nai_t5_core.prompts.cache.contents import identities, refuse_changed
from nai_t5_core.prompts.cache.encoding import CachedEncoding
from nai_t5_core.prompts.cache.noted_scales import note_scales, noted_scales
from nai_t5_core.prompts.cache.settings import settings_for
from nai_t5_core.prompts.cache.store import Store
from nai_t5_core.prompts.choices import Choices
from nai_t5_core.prompts.stack_encoding import StackEncoding
from nai_t5_core.weights.examine import Examination, ModelSource, examine
from nai_t5_core.weights.load import LoadedEncoder, load

MERGING_ROUNDS = (
    "the weights are quantised in {source}: to merge a LoRA they are unpacked, and the sum is rounded to {dtype}; a "
    "live LoRA (LiveLoras) leaves them as they lie"
)


class Loading(Choices):
    """Choices that are carried out."""

    def load(self, source: ModelSource, subfolder: str) -> LoadedEncoder:
        """The weights as they are in the file."""
        where = (self.dtype, self.device, self.layout)
        loaded = load(source, *where, subfolder, self.scales, self.attention, self.unpacks)
        if self.loras and loaded.examination.quantised:
            told = MERGING_ROUNDS.format(source=loaded.report.source, dtype=loaded.stack.dtype)
            warnings.warn(told, stacklevel=3)
        return loaded

    def finish(self, stack: T5EncoderStack) -> T5EncoderStack:
        """The same stack with its LoRAs merged, and computed in the way that was asked for."""
        # The original weights, which only this local object holds, are freed.
        merged = Loras(stack)
        for number, (lora, strength) in enumerate(self.loras):
            merged.add(lora, strength, name=str(number))
        if self.quantize:
            quantize_int8(stack, self.products)
        elif self.compile:
            # Imported only here: torch's compiler takes a second to import.
            from nai_t5_core.backends.compiled import compile_stack

            compile_stack(stack, mode=self.compile if isinstance(self.compile, str) else None)
        elif self.optimize and stays_quantised(stack):
            run_quantised(stack, self.products)
        elif self.optimize and (self.products != "auto" or why_not_prepack(stack) is None):
            prepack(stack, self.products)
        if self.optimize and not self.compile and self.attention == "auto":
            encode_on_cuda(stack)
        return stack


def cached_encoding(
    source: ModelSource, subfolder: str, how: Loading, store: Store
) -> tuple[CachedEncoding, Examination]:
    """Encodes through a store, and loads at the first miss; with the checkpoint, of which no weight was read.

    Raises:
        CheckpointError, ValueError: as loading would.
    """
    examination = examine(source, subfolder)
    examination.refuse_faults()
    loras: list[tuple[Lora, float]] = [(lora_of(lora), strength) for lora, strength in how.loras]
    for lora, _ in loras:
        refuse_misfits(lora, examination.config)
    how = replace(how, loras=loras)
    # Before the hash, which is of these files or of none.
    files = identities(examination)
    settings = settings_for(examination, how)
    noted = noted_scales(settings)
    begun = settings if noted is None else replace(settings, scales=noted)
    how = how if noted is None else replace(how, scales=noted)

    def load_now() -> StackEncoding:
        loaded = how.load(source, subfolder)
        refuse_changed(loaded.examination, files)
        return StackEncoding(how.finish(loaded.stack), loaded.report)

    place = resolve_device(how.device)
    note = partial(note_scales, settings)
    return CachedEncoding(begun, load_now, store, place, examination.checkpoint.source, note), examination
