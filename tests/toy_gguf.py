"""GGUF files of toys, written with the package gguf as llama.cpp's converter names things, or as Hugging Face does."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from nai_t5_core.facts.config import T5Config
from nai_t5_core.tokenizer.sentencepiece_format import UNUSED, SentencePieceModel

gguf = pytest.importorskip("gguf", reason="reading GGUF files needs the package gguf")

Spelling = Literal["llama.cpp", "Hugging Face"]
SPELLINGS: tuple[Spelling, ...] = ("llama.cpp", "Hugging Face")

NAMES = {
    "shared": "token_embd",
    "lm_head": "output",
    "encoder.final_layer_norm": "enc.output_norm",
    "decoder.final_layer_norm": "dec.output_norm",
    "SelfAttention.q": "attn_q",
    "SelfAttention.k": "attn_k",
    "SelfAttention.v": "attn_v",
    "SelfAttention.o": "attn_o",
    "SelfAttention.relative_attention_bias": "attn_rel_b",
    "EncDecAttention.q": "cross_attn_q",
    "EncDecAttention.k": "cross_attn_k",
    "EncDecAttention.v": "cross_attn_v",
    "EncDecAttention.o": "cross_attn_o",
    "DenseReluDense.wi_0": "ffn_gate",
    "DenseReluDense.wi_1": "ffn_up",
    "DenseReluDense.wi": "ffn_up",
    "DenseReluDense.wo": "ffn_down",
    "encoder 0.layer_norm": "attn_norm",
    "encoder 1.layer_norm": "ffn_norm",
    "decoder 0.layer_norm": "attn_norm",
    "decoder 1.layer_norm": "cross_attn_norm",
    "decoder 2.layer_norm": "ffn_norm",
}
# Kinds that the package unpacks and cannot pack, and where the float16 scales are in a block of theirs.
NOISE = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_XS": (0,),
    "IQ4_NL": (0,),
}


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor."""
    name = name.removesuffix(".weight")
    match = re.fullmatch(r"(encoder|decoder)\.block\.(\d+)\.layer\.(.+)", name)
    if match is None:
        return f"{NAMES[name]}.weight"
    stack, layer, place = match.groups()
    part = f"{stack} {place}" if place.endswith("layer_norm") else place.partition(".")[2]
    return f"{stack[:3]}.blk.{layer}.{NAMES[part]}.weight"


def write_gguf(
    path: Path,
    state: dict[str, Tensor],
    kind: str,
    tokenizer: bytes = b"",
    spelling: Spelling = "llama.cpp",
    config: T5Config | None = None,
) -> Path:
    """Matrices in a block format (where their rows are whole blocks), everything else in float32.

    A SentencePiece file given as ``tokenizer``, and a config, are written into the metadata.
    """
    writer = gguf.GGUFWriter(path, "t5" if config is not None and config.num_decoder_layers else "t5encoder")
    if config is not None:
        add_config(writer, config)
    if config is not None and not tokenizer:
        writer.add_eos_token_id(config.eos_token_id)
        writer.add_pad_token_id(config.pad_token_id)
    if tokenizer:
        add_tokenizer(writer, SentencePieceModel.parse(tokenizer), rows=len(state["shared.weight"]))
    write_tensors(writer, state, kind, gguf_name if spelling == "llama.cpp" else str)
    return path


def add_config(writer: gguf.GGUFWriter, config: T5Config) -> None:
    """What llama.cpp's converter writes of a config."""
    writer.add_context_length(512)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.num_layers)
    if config.num_decoder_layers:
        writer.add_uint32("t5.decoder_block_count", config.num_decoder_layers)  # older packages have no method for it
        writer.add_decoder_start_token_id(config.decoder_start_token_id)
    writer.add_head_count(config.num_heads)
    writer.add_key_length(config.d_kv)
    writer.add_value_length(config.d_kv)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_relative_attn_buckets_count(config.relative_attention_num_buckets)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_file_type(1)


def write_tensors(
    writer: gguf.GGUFWriter, state: dict[str, Tensor], kind: str, spell: Callable[[str], str] = gguf_name
) -> None:
    """Writes the file of a writer that has its metadata."""
    quantisation = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[quantisation]
    for name, tensor in state.items():
        values = tensor.float().numpy()
        is_matrix = tensor.ndim == 2 and "relative" not in name and tensor.shape[1] % block == 0
        if is_matrix and kind != "F32":
            writer.add_tensor(spell(name), packed(values, kind), raw_dtype=quantisation)
        else:
            writer.add_tensor(spell(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def packed(values: np.ndarray, kind: str) -> np.ndarray:
    """A matrix in blocks; of the kinds of ``NOISE``, any blocks with scales such as weights have."""
    quantisation = gguf.GGMLQuantizationType[kind]
    if kind not in NOISE:
        return np.asarray(gguf.quants.quantize(values, quantisation))
    block, size = gguf.GGML_QUANT_SIZES[quantisation]
    draw = np.random.default_rng(values.size)
    blocks = draw.integers(0, 256, (values.size // block, size), dtype=np.uint8)
    for place in NOISE[kind]:
        scales = draw.uniform(1e-5, 1e-4, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(len(values), -1)


def unpacked(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, as the package gguf itself finds and unpacks them, under the names of a state."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    meant = {}
    for name, tensor in state.items():
        found = stored.get(name) or stored[gguf_name(name)]
        values = gguf.quants.dequantize(found.data, found.tensor_type)
        meant[name] = torch.from_numpy(values.copy()).reshape(tensor.shape)
    return meant


def add_tokenizer(writer: gguf.GGUFWriter, model: SentencePieceModel, rows: int) -> None:
    """A Unigram or BPE model, with unused tokens for the rows of the embedding that have no piece."""
    filling = [(f"[PAD{number}]", -10000.0, UNUSED) for number in range(len(model.pieces), rows)]
    tokens, scores, kinds = zip(*model.pieces, *filling, strict=True)
    writer.add_tokenizer_model("llama" if model.model_type == "bpe" else "t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(list(tokens))
    writer.add_token_scores(list(scores))
    writer.add_token_types(list(kinds))
    if model.model_type != "bpe":
        writer.add_add_space_prefix(model.add_dummy_prefix)
        writer.add_remove_extra_whitespaces(model.remove_extra_whitespaces)
    if model.charsmap:
        writer.add_precompiled_charsmap(model.charsmap)
    writer.add_eos_token_id(tokens.index(model.eos_piece))
    if model.pad_piece in tokens:
        writer.add_pad_token_id(tokens.index(model.pad_piece))
    writer.add_unk_token_id(tokens.index("<unk>"))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(True)


ODD_TEXTS = (
    "a photo of a cat, highly detailed, 8k",
    "",
    "  two  spaces\tand\n\nlines ",
    "Ünïcode, ﬁne ligatures, ＦＵＬＬ width, e\u0301 and é",
    "猫 と 犬 — نص عربي и текст 😀👩‍🚀",
    "</s> <pad> <extra_id_0> <unk> ▁",
    "(weights:1.3) of [many] ((kinds:0.2))",
    "\u200b\ufeff\u00a0\u2003 zero \x7f width",
    "1234567890 3.14 x² ½ ①",
)


def random_texts(count: int, length: int = 40) -> list[str]:
    """Any characters at all, but those that stand for no character."""
    draw = random.Random(0)
    ranges = (range(32, 127), range(160, 0x250), range(0x370, 0x700), range(0x2000, 0x2100), range(0x4E00, 0x9FFF))
    return ["".join(chr(draw.choice(draw.choice(ranges))) for _ in range(length)) for _ in range(count)]
