"""An encoder that is loaded at the first prompt that is not kept.

What loads it is imported then: that takes longer than a kept embedding to read.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from nai_t5_core.backends.kernels.build import prepare_kernels, why_not_kernels
from nai_t5_core.model.precision import resolve_device
from nai_t5_core.prompts.cache.contents import identities, refuse_changed
from nai_t5_core.prompts.cache.encoding import CachedEncoding
from nai_t5_core.prompts.cache.noted_scales import note_scales, noted_scales
from nai_t5_core.prompts.cache.settings import settings_for
from nai_t5_core.prompts.cache.store import Store
from nai_t5_core.prompts.choices import Choices
from nai_t5_core.weights.examine import Examination, ModelSource, examine

if TYPE_CHECKING:
    from nai_t5_core.lora.files import Lora
    from nai_t5_core.prompts.cache.key import Settings
    from nai_t5_core.prompts.stack_encoding import StackEncoding


def cached_encoding(
    source: ModelSource, subfolder: str, how: Choices, store: Store
) -> tuple[CachedEncoding, Examination]:
    """Encodes through a store, and loads at the first miss; with the checkpoint, of which no weight was read.

    Raises:
        CheckpointError, ValueError: as loading would.
    """
    examination = examine(source, subfolder)
    examination.refuse_faults()
    how = replace(how, loras=_read(how, examination) if how.loras else ())
    # Before the hash, which is of these files or of none.
    files = identities(examination)
    settings = settings_for(examination, how)
    noted = noted_scales(settings)
    begun = settings if noted is None else replace(settings, scales=noted)
    how = how if noted is None else replace(how, scales=noted)

    place = resolve_device(how.device)

    def load_now() -> tuple[StackEncoding, Settings]:
        from nai_t5_core.prompts.loading import finish, load_chosen
        from nai_t5_core.prompts.stack_encoding import StackEncoding

        loaded = load_chosen(source, subfolder, how)
        refuse_changed(loaded.examination, files)
        encoding = StackEncoding(finish(loaded.stack, how), loaded.report)
        # Whether kernels that are expected can be built is known once that was tried.
        if place.type == "cpu" and how.products != "onednn" and why_not_kernels() is None:
            prepare_kernels()
        return encoding, replace(begun, backend=settings_for(examination, how, begun.weights).backend)

    note = partial(note_scales, settings)
    return CachedEncoding(begun, load_now, store, place, examination.checkpoint.source, note), examination


def _read(how: Choices, examination: Examination) -> list[tuple[Lora, float]]:
    """The LoRAs, which fit the encoder."""
    from nai_t5_core.lora.set import lora_of, refuse_misfits

    loras = [(lora_of(lora), strength) for lora, strength in how.loras]
    for lora, _ in loras:
        refuse_misfits(lora, examination.config)
    return loras
