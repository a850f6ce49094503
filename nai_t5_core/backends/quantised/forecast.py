"""What will compute an encoder whose weights stay quantised, in words."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import chain

import torch

from nai_t5_core.backends.choices import ProductsChoice, set_of
from nai_t5_core.backends.cuda.byte_kinds import is_read as cuda_reads
from nai_t5_core.backends.forecast import in_place, on_cuda
from nai_t5_core.backends.kernels.build import set_to_use
from nai_t5_core.backends.quantised.kinds import Kind
from nai_t5_core.backends.quantised.pieces import is_read
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import StackScales
from nai_t5_core.model.attention_choice import AttentionChoice
from nai_t5_core.model.encoder import Layout


def forecast_quantised(
    config: T5Config,
    device: torch.device,
    dtype: torch.dtype,
    kinds: Iterable[Collection[Kind]],
    layout: Layout = "fused",
    scales: StackScales | None = None,
    optimize: bool = True,
    attention: AttentionChoice = "auto",
    products: ProductsChoice = "auto",
) -> str:
    """As :func:`nai_t5_core.backends.forecast.forecast`, of an encoder whose weights stay quantised.

    Args:
        kinds: those of the projections of each layer; a layer may have none, and is computed as others are then.
    """
    words = f"{device.type}, quantised weights, {attention}"
    kinds = [list(of_layer) for of_layer in kinds]
    if device.type == "cuda" and optimize and attention == "auto" and all(cuda_reads(kind) for kind in chain(*kinds)):
        return f"{words}, {on_cuda(device)}"
    if device.type != "cpu":
        return words
    plain = "torch" if all(kinds) else in_place(config, dtype, layout, scales)
    if plain != "torch":
        words = f"{words}, beside {plain}"
    instructions = set_to_use(set_of(products))
    is_any_read = any(is_read(kind) for of_layer in kinds for kind in of_layer)
    if instructions is None or dtype not in instructions.stored or not is_any_read:
        return words
    # A block that they cannot compute as a whole still has its products by them.
    return f"{words}, {instructions.title} kernels for all that they read"
