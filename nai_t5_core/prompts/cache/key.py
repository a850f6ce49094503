"""The key of an embedding: everything that can change it, and nothing else.

Not in the key are the batch that a prompt is encoded in, how many pads are computed that nothing attends to, and the
dtype in which the result is stored. The prompt's text and the tokenizer are in it by the ids that come of them; so is
the id of such pads where it is not the usual one, since the rows behind the prompt's own are computed of it. Imports
no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import StackScales

# To be raised whenever the same ingredients give another result than before: entries of older programs then miss.
NUMERICS = 3

# What pads are in the tokenizers of nearly all T5s. Rows that are computed of these are kept behind a prompt's own
# without a word in the key, so that a prompt is found whether they are computed or not.
USUAL_PAD = 0

# The part of a config that the encoder computes with. Ids of special tokens act through the ids that are fed.
_READ_BY_THE_ENCODER = {
    *("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "gated", "activation", "bias_per_layer"),
    *("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon", "scale_qk"),
}


@dataclass(frozen=True)
class LoraUse:
    """A LoRA that an encoder computes with.

    Attributes:
        contents: the hash of what it changes, see :func:`nai_t5_core.prompts.cache.contents.lora_contents`.
        strength: 0 is as if the LoRA were not there.
        way: merged into the weights, or computed beside them, which rounds in other places.
    """

    contents: str
    strength: float
    way: Literal["merged", "live"] = "merged"


@dataclass(frozen=True)
class Key:
    """What an embedding is kept under.

    Attributes:
        text: all ingredients as JSON. Two embeddings are the same if and only if these texts are.
    """

    text: str

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits, the entry's name."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Settings:
    """All that the embeddings of one encoder have in common; :meth:`key` adds what is fed to it.

    Attributes:
        weights: the hash of their contents, see :func:`nai_t5_core.prompts.cache.contents.weights_contents`.
        config: its sizes and kind.
        dtype: that it computes in, such as ``"bfloat16"``.
        backend: what computes it, in words, see :func:`nai_t5_core.backends.forecast.forecast`.
        layout: of the weights; in the fused one, norms are rounded into the projections.
        scales: those of float16 that are in force. None is the same as scales of 1.
        loras: in the order in which they are added up.
        vectors: of textual inversion: the hash of the vector that each id beyond the vocabulary stands for.
    """

    weights: str
    config: T5Config
    dtype: str
    backend: str
    layout: str = "fused"
    scales: StackScales | None = None
    loras: tuple[LoraUse, ...] = ()
    vectors: Mapping[int, str] = field(default_factory=dict)

    def key(self, ids: Sequence[int], pads: Sequence[int] = ()) -> Key:
        """The key of one prompt's hidden states.

        Args:
            ids: all that is attended to, in order: the tokens with the end token, and the pads where they are tokens
                like others (``padding="attend"``).
            pads: the ids behind them that nothing attends to, and whose hidden states are kept all the same. How many
                there are makes no other key.

        Raises:
            ValueError: there are no ids.
        """
        if not ids:
            raise ValueError("a key needs at least one id: also the empty prompt has its end token")
        fed: dict[str, Any] = {"ids": [int(number) for number in ids]}
        kinds = {int(number) for number in pads}
        if kinds - {USUAL_PAD}:
            fed["pads"] = [int(number) for number in pads] if len(kinds) > 1 else list(kinds)
        if self.vectors:
            shown = {*fed["ids"], *kinds}
            used = {str(number): self.vectors[number] for number in sorted(shown) if number in self.vectors}
            fed |= {"vectors": used} if used else {}
        return Key(f"{self._common[:-1]},{_json(fed)[1:]}")

    @cached_property
    def _common(self) -> str:
        config = self.config.model_dump(include=_READ_BY_THE_ENCODER)
        loras = [[use.contents, float(use.strength), use.way] for use in self.loras if use.strength]
        return _json(
            {
                "numerics": NUMERICS,
                "weights": self.weights,
                "config": dict(sorted(config.items())),
                "dtype": self.dtype,
                "backend": self.backend,
                "layout": self.layout,
                "scales": None if self.scales is None or self.scales.is_one else json.loads(self.scales.to_json()),
                "loras": loras,
            }
        )


# json.dumps would make an encoder for each key, and a caption set has millions.
_json = json.JSONEncoder(separators=(",", ":")).encode
