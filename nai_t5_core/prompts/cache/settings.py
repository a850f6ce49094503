"""The settings that an encoder will have, before it is loaded: no weight is read but to hash the files, once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nai_t5_core.backends.choose import ProductsChoice, Quantisation
from nai_t5_core.backends.forecast import forecast
from nai_t5_core.lora.set import LoraSource, lora_of
from nai_t5_core.model.attention_choice import AttentionChoice, missing_for_flex, refuse_unsupported
from nai_t5_core.model.encoder import Layout
from nai_t5_core.prompts.cache.contents import lora_contents, weights_contents
from nai_t5_core.prompts.cache.key import LoraUse, Settings
from nai_t5_core.weights.examine import Examination, ModelSource, examine
from nai_t5_core.weights.load import ScalesChoice, place_for, told_scales


def settings_of(
    source: ModelSource = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    layout: Layout = "fused",
    subfolder: str = "",
    scales: ScalesChoice = "auto",
    optimize: bool = True,
    quantize: Quantisation | None = None,
    compile: bool | str = False,  # noqa: A002
    attention: AttentionChoice = "auto",
    loras: Sequence[tuple[LoraSource, float]] = (),
    products: ProductsChoice = "auto",
    unpack: bool = False,
) -> Settings:
    """The settings of an encoder by the arguments of :meth:`nai_t5_core.TextEncoder.from_pretrained`.

    >>> settings_of("t5xxl_fp16.safetensors", dtype="bfloat16").key([3, 9, 1782, 1]).digest

    Raises:
        CheckpointError: the checkpoint or a LoRA is unusable.
        ValueError: an unknown dtype or device.
    """
    examination = examine(source, subfolder)
    return settings_for(
        examination, dtype, device, layout, scales, optimize, quantize, compile, attention, loras, products, unpack
    )


def settings_for(
    examination: Examination,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    layout: Layout = "fused",
    scales: ScalesChoice = "auto",
    optimize: bool = True,
    quantize: Quantisation | None = None,
    compile: bool | str = False,  # noqa: A002
    attention: AttentionChoice = "auto",
    loras: Sequence[tuple[LoraSource, float]] = (),
    products: ProductsChoice = "auto",
    unpack: bool = False,
    weights: str | None = None,
) -> Settings:
    """As :func:`settings_of`, of a checkpoint that is examined already.

    Args:
        weights: the hash of their contents, where it is known; of a model in memory it has to be given.
    """
    examination.refuse_faults()
    place, computed_in = place_for(device, dtype, layout, attention)
    config = examination.config.encoder_only()
    told = told_scales(examination, computed_in, scales)
    if attention == "flex":
        refuse_unsupported(place, computed_in, config.d_kv)
        attention = "sdpa" if missing_for_flex(place) else "flex"
    backend = forecast(config, place, computed_in, layout, told, optimize, quantize, compile, attention, products)
    if examination.quantised and not (unpack or loras or compile):
        # In 8 bits they are made of the exact numbers, and not of those that the dtype holds.
        backend = f"{backend}, of quantised weights" if quantize else f"{place.type}, quantised weights, {attention}"
    return Settings(
        weights=weights_contents(examination) if weights is None else weights,
        config=config,
        dtype=str(computed_in).removeprefix("torch."),
        backend=backend,
        layout=layout,
        # Where the embedding gets a scale as well, that follows from the weights.
        scales=told,
        loras=tuple(LoraUse(lora_contents(lora_of(lora)), strength) for lora, strength in loras),
    )
