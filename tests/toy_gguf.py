"""GGUF files of toys, written with the package gguf as llama.cpp's converter names things."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from nai_t5_core.tokenizer.sentencepiece_format import UNUSED, SentencePieceModel

gguf = pytest.importorskip("gguf", reason="reading GGUF files needs the package gguf")

NAMES = {
    "shared": "token_embd",
    "encoder.final_layer_norm": "enc.output_norm",
    "SelfAttention.q": "attn_q",
    "SelfAttention.k": "attn_k",
    "SelfAttention.v": "attn_v",
    "SelfAttention.o": "attn_o",
    "SelfAttention.relative_attention_bias": "attn_rel_b",
    "0.layer_norm": "attn_norm",
    "DenseReluDense.wi_0": "ffn_gate",
    "DenseReluDense.wi_1": "ffn_up",
    "DenseReluDense.wi": "ffn_up",
    "DenseReluDense.wo": "ffn_down",
    "1.layer_norm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    name = name.removesuffix(".weight")
    match = re.fullmatch(r"encoder\.block\.(\d+)\.layer\.(.+)", name)
    if match is None:
        return f"{NAMES[name]}.weight"
    part = match[2] if match[2].endswith("layer_norm") else match[2].partition(".")[2]
    return f"enc.blk.{match[1]}.{NAMES[part]}.weight"


def write_gguf(path: Path, state: dict[str, Tensor], kind: str, tokenizer: bytes = b"") -> Path:
    """Matrices in a block format (whose rows are multiples of 32), everything else in float32.

    A SentencePiece file given as ``tokenizer`` is written into the metadata.
    """
    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_block_count(3)
    if tokenizer:
        add_tokenizer(writer, SentencePieceModel.parse(tokenizer), rows=len(state["shared.weight"]))
    write_tensors(writer, state, kind)
    return path


def write_tensors(writer: gguf.GGUFWriter, state: dict[str, Tensor], kind: str) -> None:
    """Writes the file of a writer that has its metadata."""
    quantisation = getattr(gguf.GGMLQuantizationType, kind)
    for name, tensor in state.items():
        values = tensor.float().numpy()
        is_matrix = tensor.ndim == 2 and "relative" not in name and tensor.shape[1] % 32 == 0
        if is_matrix and kind != "F32":
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, model: SentencePieceModel, rows: int) -> None:
    """A Unigram model, with unused tokens for the rows of the embedding that have no piece."""
    filling = [(f"[PAD{number}]", -10000.0, UNUSED) for number in range(len(model.pieces), rows)]
    tokens, scores, kinds = zip(*model.pieces, *filling, strict=True)
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(list(tokens))
    writer.add_token_scores(list(scores))
    writer.add_token_types(list(kinds))
    writer.add_add_space_prefix(model.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(model.remove_extra_whitespaces)
    if model.charsmap:
        writer.add_precompiled_charsmap(model.charsmap)
    writer.add_eos_token_id(tokens.index(model.eos_piece))
    writer.add_pad_token_id(tokens.index(model.pad_piece))
    writer.add_unk_token_id(tokens.index("<unk>"))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(True)
