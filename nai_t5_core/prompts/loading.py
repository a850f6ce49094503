"""How an encoder is loaded and made ready.

Imported when that is done: what can load, merge and compute takes longer to import than a kept embedding to read.
"""

from __future__ import annotations

import warnings

from nai_t5_core.backends.choose import encode_on_cuda, prepack, quantize_int8, run_quantised, why_not_prepack
from nai_t5_core.backends.cuda.int8 import quantise_at_rest
from nai_t5_core.backends.quantised.projections import stays_quantised
from nai_t5_core.lora.loras import Loras
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.precision import resolve_device
from nai_t5_core.prompts.choices import Choices
from nai_t5_core.weights.examine import ModelSource
from nai_t5_core.weights.load import LoadedEncoder, load

MERGING_ROUNDS = (
    "the weights are quantised in {source}: to merge a LoRA they are unpacked, and the sum is rounded to {dtype}; a "
    "live LoRA (LiveLoras) leaves them as they lie"
)


def load_chosen(source: ModelSource, subfolder: str, how: Choices) -> LoadedEncoder:
    """The weights as they are in the file."""
    where = (how.dtype, how.device, how.layout)
    # Offloaded layers stay on the host; those to be quantised go to a GPU one by one: it never has all as they were.
    by_way_of_host = how.offload or (bool(how.quantize) and resolve_device(how.device).type == "cuda")
    loaded = load(source, *where, subfolder, how.scales, how.attention, how.unpacks, by_way_of_host)
    if how.loras and loaded.examination.quantised:
        told = MERGING_ROUNDS.format(source=loaded.report.source, dtype=loaded.stack.dtype)
        warnings.warn(told, stacklevel=3)
    return loaded


def finish(stack: T5EncoderStack, how: Choices) -> T5EncoderStack:
    """The same stack with its LoRAs merged, and computed in the way that was asked for."""
    # The original weights, which only this local object holds, are freed.
    merged = Loras(stack)
    for number, (lora, strength) in enumerate(how.loras):
        merged.add(lora, strength, name=str(number))
    if how.offload:
        # Imported only here, as little else needs it.
        from nai_t5_core.backends.offload.offload import offload_layers

        if how.quantize:
            quantise_at_rest(stack, resolve_device(how.device))
        return offload_layers(stack, resolve_device(how.device), how.optimize and how.attention == "auto")
    if how.quantize:
        quantize_int8(stack, how.products, resolve_device(how.device))
    elif how.compile:
        # Imported only here: torch's compiler takes a second to import.
        from nai_t5_core.backends.compiled import compile_stack

        compile_stack(stack, mode=how.compile if isinstance(how.compile, str) else None)
    elif how.optimize and stays_quantised(stack):
        run_quantised(stack, how.products)
    elif how.optimize and (how.products != "auto" or why_not_prepack(stack) is None):
        prepack(stack, how.products)
    if how.optimize and not how.compile and how.attention == "auto":
        encode_on_cuda(stack)
    return stack
