"""Random models that overflow plain float16 in chosen places, as trained T5s do.

In real T5-XXL checkpoints some activations exceed 65504. These random models imitate that: their activations are of
order one, except for the chosen outliers in one or two layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from nai_t5_core.bench.peers import random_state
from nai_t5_core.facts.config import T5Config, config_to_hf
from nai_t5_core.weights.examine import find_tokenizer_for
from nai_t5_core.weights.formats import write_safetensors
from nai_t5_core.weights.whole_files import write_whole

Outlier = Literal[
    "feed_forward_out", "hidden", "attention_out", "cross_attention_out", "embedding", "large_norm", "small_norm"
]
Stack = Literal["encoder", "decoder"]


def outliers_of(stack: Stack) -> tuple[Outlier, ...]:
    """The kinds of outliers that an encoder or a decoder can have."""
    return tuple(kind for kind in get_args(Outlier) if stack == "decoder" or kind != "cross_attention_out")


OUTLIERS = outliers_of("encoder")


def stress_state(
    config: T5Config, outlier: Outlier, layer: int = 1, seed: int = 0, stack: Stack = "encoder"
) -> dict[str, Tensor]:
    """Weights under Hugging Face names, float32, with one kind of outlier in one layer of the encoder or decoder.

    - ``feed_forward_out``, ``attention_out``, ``cross_attention_out``: the sublayer's output exceeds float16 in one
      channel; every weight fits.
    - ``hidden``: the feed-forward's inner product exceeds float16; gate, up and output do not.
    - ``embedding``: the embedding table exceeds float16 in one channel.
    - ``large_norm``, ``small_norm``: norm weights of the layer are a thousand times larger, or smaller; the projections
      that follow compensate for it.

    Raises:
        ValueError: an unknown outlier, or a layer that the model does not have.
    """
    if outlier not in outliers_of(stack):
        raise ValueError(f"unknown outlier {outlier!r}; allowed: {', '.join(outliers_of(stack))}")
    layers = config.num_layers if stack == "encoder" else config.num_decoder_layers
    if layers == 0:
        raise ValueError("these are the sizes of an encoder alone; there is no decoder to overflow")
    if not 0 <= layer < layers:
        raise ValueError(f"layer={layer}; the {stack} has layers 0 to {layers - 1}")
    state = random_state(config, seed)
    last = 1 if stack == "encoder" else 2
    block = f"{stack}.block.{layer}.layer"
    attention, cross, dense = f"{block}.0.SelfAttention", f"{block}.1.EncDecAttention", f"{block}.{last}.DenseReluDense"
    inputs = ("wi_0", "wi_1") if config.gated else ("wi",)
    match outlier:
        case "feed_forward_out":
            state[f"{dense}.wo.weight"][3] *= 1e5
        case "attention_out" | "cross_attention_out":
            module = attention if outlier == "attention_out" else cross
            state[f"{module}.v.weight"] *= 100
            state[f"{module}.o.weight"][3] *= 1e4
        case "hidden":
            _make_hidden_large(state, dense, inputs, config)
        case "embedding":
            state["shared.weight"][:, 3] = 1e5 + torch.randn(config.vocab_size, generator=_generator(seed)) * 1e3
        case "large_norm" | "small_norm":
            factor = 1e3 if outlier == "large_norm" else 1e-3
            for sublayer, module, names in ((0, attention, "qkv"), (last, dense, inputs)):
                state[f"{block}.{sublayer}.layer_norm.weight"] *= factor
                for name in names:
                    state[f"{module}.{name}.weight"] /= factor
    return state


def write_stress_checkpoint(
    folder: Path, config: T5Config, outlier: Outlier, layer: int = 1, seed: int = 0, stack: Stack = "encoder"
) -> Path:
    """Writes a model of :func:`stress_state` as a Hugging Face folder, with the embedded model's tokenizer.

    Raises:
        ValueError: as :func:`stress_state`, or a vocabulary smaller than the tokenizer's.
    """
    tokenizer = find_tokenizer_for(None)
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"vocab_size={config.vocab_size}; the tokenizer has {tokenizer.vocab_size} tokens")
    state = stress_state(config, outlier, layer, seed, stack)
    folder.mkdir(parents=True, exist_ok=True)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    write_safetensors(folder / "model.safetensors", layout, state.items(), {"format": "pt"})
    write_whole(folder / "config.json", json.dumps(config_to_hf(config)))
    kind, content = tokenizer.serialized()
    write_whole(folder / ("spiece.model" if kind == "sentencepiece" else "tokenizer.json"), content)
    return folder


def _make_hidden_large(state: dict[str, Tensor], dense: str, inputs: tuple[str, ...], config: T5Config) -> None:
    """Makes gate and up large in a few inner channels, and the out-projection small there to compensate."""
    channels = slice(0, max(1, config.d_ff // 64))
    for name in inputs:
        state[f"{dense}.{name}.weight"][channels] *= 1e3 if config.gated else 1e5
    state[f"{dense}.wo.weight"][:, channels] *= 1e-4


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
