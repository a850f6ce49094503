"""The settings that an encoder will have, before it is loaded: no weight is read but to hash the files, once."""

from __future__ import annotations

from typing import Any

import torch

from nai_t5_core.backends.forecast import forecast
from nai_t5_core.backends.quantised.kinds import Kind
from nai_t5_core.model.attention_choice import missing_for_flex, refuse_unsupported
from nai_t5_core.prompts.cache.contents import weights_contents
from nai_t5_core.prompts.cache.key import LoraUse, Settings
from nai_t5_core.prompts.choices import Choices
from nai_t5_core.weights.chosen import place_for, told_scales
from nai_t5_core.weights.examine import Examination, ModelSource, examine


def settings_of(
    source: ModelSource = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    subfolder: str = "",
    **others: Any,
) -> Settings:
    """The settings of an encoder by the arguments of :meth:`nai_t5_core.TextEncoder.from_pretrained`.

    >>> settings_of("t5xxl_fp16.safetensors", dtype="bfloat16").key([3, 9, 1782, 1]).digest

    Args:
        others: the other fields of :class:`nai_t5_core.prompts.choices.Choices`.

    Raises:
        CheckpointError: the checkpoint or a LoRA is unusable.
        ValueError: an unknown dtype or device.
    """
    return settings_for(examine(source, subfolder), Choices(dtype, device, **others))


def settings_for(examination: Examination, how: Choices, weights: str | None = None) -> Settings:
    """As :func:`settings_of`, of a checkpoint that is examined already.

    Args:
        weights: the hash of their contents, where it is known; of a model in memory it has to be given.
    """
    examination.refuse_faults()
    place, computed_in = place_for(how.device, how.dtype, how.layout, how.attention)
    config = examination.config.encoder_only()
    told = told_scales(examination, computed_in, how.scales)
    attention = how.attention
    if attention == "flex":
        refuse_unsupported(place, computed_in, config.d_kv)
        attention = "sdpa" if missing_for_flex(place) else "flex"
    backend = forecast(
        config,
        place,
        computed_in,
        layout=how.layout,
        scales=told,
        optimize=how.optimize,
        quantize=how.quantize,
        compile=how.compile,
        attention=attention,
        products=how.products,
    )
    if examination.quantised and not how.unpacks:
        # In 8 bits they are made of the exact numbers, and not of those that the dtype holds.
        backend = f"{backend}, of quantised weights"
        if not how.quantize:
            # Imported where weights are quantised: a prompt that is kept comes sooner without.
            from nai_t5_core.backends.quantised.forecast import forecast_quantised

            backend = forecast_quantised(
                config,
                place,
                computed_in,
                _kinds_of_layers(examination),
                layout=how.layout,
                scales=told,
                optimize=how.optimize,
                attention=attention,
                products=how.products,
            )
    return Settings(
        weights=weights_contents(examination) if weights is None else weights,
        config=config,
        dtype=str(computed_in).removeprefix("torch."),
        backend=backend,
        layout=how.layout,
        # Where the embedding gets a scale as well, that follows from the weights.
        scales=told,
        loras=_uses(how) if how.loras else (),
    )


def _uses(how: Choices) -> tuple[LoraUse, ...]:
    # Imported where there are LoRAs: a prompt that is kept comes sooner without.
    from nai_t5_core.lora.set import lora_of
    from nai_t5_core.prompts.cache.lora_contents import uses_of

    return uses_of((lora_of(lora), strength) for lora, strength in how.loras)


def _kinds_of_layers(examination: Examination) -> list[list[Kind]]:
    """The kinds of the quantised projections of each layer of the encoder."""
    found: dict[str, list[Kind]] = {str(layer): [] for layer in range(examination.config.num_layers)}
    for name, stored in examination.quantised.items():
        if name.startswith("encoder.block."):
            found[name.split(".")[2]].append(stored.kind)
    return list(found.values())
