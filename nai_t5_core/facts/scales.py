"""Powers of two that keep a float16 model inside float16's range, exactly.

A sublayer's output is added to a float32 residual, so its last matrix product may be scaled down, and the scale be
divided out in that addition. A layer has three scales (four in a decoder), each a power of two, at most 1:

- ``attention_out``, ``feed_forward_out``, and a decoder's ``cross_attention_out``: what the out-projection's weight is
  multiplied by; the sum with the residual divides by it, in float32.
- ``hidden``: what the feed-forward's inner product gate · up is multiplied by (through the up projection); the
  out-projection divides by it.

Nothing else changes: the residual, the norms and their epsilons stay those of the unscaled model. Multiplying by a
power of two only moves an exponent, so every result is the same until something over- or underflows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from operator import mul
from typing import Any, Literal

from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.nested_text import parse_object, shown

FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class LayerScales:
    """The scales of one layer."""

    attention_out: float = 1.0
    feed_forward_out: float = 1.0
    hidden: float = 1.0
    # For decoders only; it has a default since older files lack it.
    cross_attention_out: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value <= 1 or math.frexp(value)[0] != 0.5:
                raise ValueError(f"{name}={value}; a scale must be a power of two, at most 1 and above 0")


@dataclass(frozen=True)
class StackScales:
    """The scales of an encoder or decoder, and of the embedding table it starts from."""

    layers: tuple[LayerScales, ...]
    embedding: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.embedding <= 1 or math.frexp(self.embedding)[0] != 0.5:
            raise ValueError(f"embedding={self.embedding}; a scale must be a power of two, at most 1 and above 0")

    @property
    def is_one(self) -> bool:
        """Whether nothing is scaled."""
        return self.embedding == 1 and all(layer == LayerScales() for layer in self.layers)

    def with_layer(self, index: int, scales: LayerScales) -> StackScales:
        """A copy with other scales for one layer."""
        return replace(self, layers=(*self.layers[:index], scales, *self.layers[index + 1 :]))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StackScales:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: the text is something else, or holds a number that is no scale.
        """
        try:
            return cls.from_values(parse_object(text))
        except ValueError as error:
            raise ValueError(f"these are no scales: {error}") from error

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> StackScales:
        """The same of what the text stands for; raises ValueError as :meth:`from_json`."""
        try:
            return cls(tuple(LayerScales(**layer) for layer in values["layers"]), values["embedding"])
        except (TypeError, KeyError) as error:
            raise ValueError(f"{error} of {shown(values)}") from error


def scale_for(maximum: float, headroom: float) -> float:
    """The largest power of two, at most 1, that leaves ``headroom`` between ``maximum`` and float16's limit."""
    if maximum * headroom <= FLOAT16_MAX:
        return 1.0
    return float(2.0 ** math.floor(math.log2(FLOAT16_MAX / (maximum * headroom))))


def unscaled(layers: int) -> StackScales:
    return StackScales((LayerScales(),) * layers)


def _from_residual_scales(scales: Sequence[float], is_decoder: bool = False) -> StackScales:
    """From hand-picked factors, one per feed-forward, each of which also scales the residual of all later sublayers."""
    after = list(accumulate(scales, mul))
    return StackScales(
        tuple(
            LayerScales(before, now, cross_attention_out=before if is_decoder else 1.0)
            for before, now in zip([1.0, *after], after, strict=False)
        )
    )


# Scales that the authors of NovelAI's T5 found by hand for the published T5 v1.1 models, by size.
_PUBLISHED_ENCODERS = {
    "small": _from_residual_scales([1, 1, 1 / 2, 1, 1, 1, 1, 1 / 2]),
    "xl": _from_residual_scales([1, 1 / 2, 1, 1, 1, 1 / 4, *[1] * 18]),
    "xxl": _from_residual_scales([*[1] * 7, 1 / 4, *[1] * 16]),
}
_PUBLISHED_DECODERS = {"small": _from_residual_scales([1, 1, 1 / 2, 1, 1, 1, 1, 1], is_decoder=True)}


def published_scales(config: T5Config, stack: Literal["encoder", "decoder"] = "encoder") -> StackScales | None:
    """The hand-picked scales of the published T5 v1.1 checkpoint with these dimensions, or None.

    They were found for v1.1. Models of the same dimensions that were trained further (FLAN, or those inside diffusion
    models) have similar outliers; the guard tightens what does not fit.
    """
    name = config.size_name or ""
    table = _PUBLISHED_ENCODERS if stack == "encoder" else _PUBLISHED_DECODERS
    scales = table.get(name.removeprefix("t5-v1_1-")) if name.startswith("t5-v1_1-") else None
    layers = config.num_layers if stack == "encoder" else config.num_decoder_layers
    return scales if scales and len(scales.layers) == layers else None
