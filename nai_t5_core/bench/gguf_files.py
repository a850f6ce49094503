"""GGUF files of an encoder, for measurements: named as llama.cpp's converter names things, in one kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nai_t5_core.backends.quantised.packing import KINDS, pack
from nai_t5_core.bench.peers import State, require
from nai_t5_core.facts.config import T5Config, encoder_tensors

# The extra of this package that brings gguf.
EXTRA = "llama-cpp"
_FLOATS = {"F32": torch.float32, "F16": torch.float16}
# A weight in a kind by ggml's name, as bytes or numbers.
Pack = Callable[[Tensor, str], np.ndarray]
# llama.cpp's names for the parts of a block.
_PARTS = {
    "layer.0.SelfAttention.q": "attn_q",
    "layer.0.SelfAttention.k": "attn_k",
    "layer.0.SelfAttention.v": "attn_v",
    "layer.0.SelfAttention.o": "attn_o",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wi": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
    "layer.1.layer_norm": "ffn_norm",
}
_OTHERS = {"shared": "token_embd", "encoder.final_layer_norm": "enc.output_norm"}


def packed(weight: Tensor, kind: str) -> np.ndarray:
    """A weight [rows, columns] float32 in a kind.

    Raises:
        ValueError: nothing here packs this kind.
    """
    if kind in _FLOATS:
        return weight.to(_FLOATS[kind]).numpy()
    if kind == "BF16":
        return weight.bfloat16().view(torch.uint8).numpy()
    ours = next((own for own, each in KINDS.items() if each.name == kind), None)
    if ours is not None:
        return pack(weight, ours).parts["weight"].numpy()
    gguf = require("gguf", extra=EXTRA)
    try:
        return gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    except NotImplementedError as error:
        raise ValueError(f"{kind} cannot be packed here: the package gguf can only unpack it") from error


def write_gguf(path: Path, config: T5Config, state: State, kind: str, packing: Pack = packed) -> Path:
    """Writes an encoder as llama.cpp's converter does, without a tokenizer.

    Args:
        kind: of the projections, by ggml's name: F32, F16, BF16, or a kind of blocks. Of blocks, the table of
            embeddings is in Q8_0; norms and biases are always in float32.
        packing: makes a kind's bytes of a weight.

    Raises:
        ValueError: gguf is not installed, an unknown kind or one that ``packing`` does not make, or a config that
            llama.cpp cannot compute.
    """
    gguf = require("gguf", extra=EXTRA)
    _refuse(config)
    if kind not in gguf.GGMLQuantizationType.__members__:
        raise ValueError(f"unknown kind {kind!r}; give one of ggml's, such as BF16, Q8_0 or Q4_K")
    writer = gguf.GGUFWriter(path, "t5encoder")
    _write_config(writer, config)
    for name in encoder_tensors(config.encoder_only()):
        tensor = state[name]
        is_plain = tensor.ndim == 1 or "relative_attention_bias" in name
        is_table = name == "shared.weight" and kind not in (*_FLOATS, "BF16")
        own = "F32" if is_plain else "Q8_0" if is_table else kind
        writer.add_tensor(_name(name), packing(tensor.float(), own), raw_dtype=gguf.GGMLQuantizationType[own])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _refuse(config: T5Config) -> None:
    if (config.gated, config.activation) not in ((False, "relu"), (True, "gelu_new")):
        kind = f"{'gated ' if config.gated else ''}{config.activation}"
        raise ValueError(f"llama.cpp has no {kind} feed-forward; it has relu and gated gelu_new")
    if config.relative_attention_max_distance != 128:
        distance = config.relative_attention_max_distance
        raise ValueError(f"llama.cpp has no relative_attention_max_distance={distance}: it is always 128")
    if config.scale_qk:
        raise ValueError("llama.cpp has no scale_qk=True: its T5 never divides the logits by √d_kv")


def _write_config(writer: Any, config: T5Config) -> None:
    writer.add_context_length(8192)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_key_length(config.d_kv)
    writer.add_value_length(config.d_kv)
    writer.add_relative_attn_buckets_count(config.relative_attention_num_buckets)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)


def _name(name: str) -> str:
    """What llama.cpp calls a tensor."""
    module = name.removesuffix(".weight")
    if module in _OTHERS:
        return f"{_OTHERS[module]}.weight"
    _, _, layer, place = module.split(".", 3)
    return f"enc.blk.{layer}.{_PARTS[place]}.weight"
