"""llama.cpp's T5 encoder on the CPU, by the low-level interface of the package llama-cpp-python.

It reads a GGUF file, which is written here from the same weights. Token ids are fed directly, so the file has no
tokenizer.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nai_t5_core.backends.quantised.packing import KINDS, pack
from nai_t5_core.bench.peers import State, require
from nai_t5_core.facts.config import T5Config, encoder_tensors

LLAMA_CPP = "llama-cpp-python"
_EXTRA = "llama-cpp"
_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
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


class LlamaCppEncoder(nn.Module):
    """An encoder of llama.cpp, called as a module is. It has no layers that could be looked into.

    Args:
        path: the GGUF file, which is read, and not needed afterwards.

    Raises:
        ValueError: llama-cpp-python is not installed, or cannot read the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._model: Any = None
        self._context: Any = None
        self._longest = 0
        library = _library()
        settings = library.llama_model_default_params()
        settings.use_mmap = False
        self._model = library.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise ValueError(f"llama.cpp cannot read {path}")
        self._width = library.llama_model_n_embd(self._model)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """[batch, length] ids and a mask, or None, to float32 hidden states [batch, length, d_model].

        Each prompt runs by itself, without its masked end, whose rows are zeros.

        Raises:
            ValueError: a mask of something else than the end.
        """
        out = torch.zeros(*ids.shape, self._width)
        for number, row in enumerate(ids):
            count = len(row) if mask is None else int(mask[number].bool().sum())
            if mask is not None and not bool(mask[number, :count].bool().all()):
                raise ValueError("llama.cpp's prompts can only end early: mask their ends")
            if count:
                out[number, :count] = self._encode(row[:count])
        return out

    def _encode(self, ids: Tensor) -> Tensor:
        library = _library()
        self._make_room(len(ids))
        batch = library.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for place, token in enumerate(ids.tolist()):
                batch.token[place], batch.pos[place] = token, place
                batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
            if library.llama_encode(self._context, batch):
                raise RuntimeError(f"llama.cpp could not encode {len(ids)} tokens")
        finally:
            library.llama_batch_free(batch)
        found = library.llama_get_embeddings(self._context)
        return torch.from_numpy(np.ctypeslib.as_array(found, (len(ids), self._width)).copy())

    def _make_room(self, count: int) -> None:
        """A context takes prompts up to a length, and memory for the square of it."""
        if count <= self._longest:
            return
        library = _library()
        self._free_context()
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = count
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.embeddings = True
        settings.pooling_type = library.LLAMA_POOLING_TYPE_NONE
        self._context = library.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no memory for {count} tokens")
        self._longest = count

    def _free_context(self) -> None:
        if self._context:
            _library().llama_free(self._context)
        self._context, self._longest = None, 0

    def __del__(self) -> None:
        if self._model:
            self._free_context()
            _library().llama_model_free(self._model)


def llama_cpp_encoder(config: T5Config, state: State, dtype: torch.dtype) -> nn.Module:
    """llama.cpp's encoder of these weights in ``dtype``, with as many threads as torch has when it is first called.

    Its activation is a table of float16 whatever the dtype, and products of bfloat16 and float16 weights round
    activations to these.

    Raises:
        ValueError: llama-cpp-python or gguf is not installed, or llama.cpp cannot compute this config or dtype.
    """
    if dtype not in _KINDS:
        raise ValueError(f"llama.cpp has weights in float32, bfloat16 and float16, not in {dtype}")
    _library()
    with TemporaryDirectory() as folder:
        return LlamaCppEncoder(write_gguf(Path(folder) / "t5.gguf", config, state, _KINDS[dtype]))


def layers_of_llama_cpp(model: nn.Module) -> nn.ModuleList:
    """Raises a ValueError: what llama.cpp computes is seen at its end alone."""
    raise ValueError("llama.cpp shows the last hidden states only; leave --per-layer out")


def write_gguf(path: Path, config: T5Config, state: State, kind: str) -> Path:
    """Writes an encoder as llama.cpp's converter does, without a tokenizer.

    Args:
        kind: of the projections, by ggml's name: F32, F16, BF16, or a kind of blocks that the package gguf or we can
            make. Of blocks, the table of embeddings is in Q8_0; norms and biases are always in float32.

    Raises:
        ValueError: gguf is not installed, an unknown kind, or a config that llama.cpp cannot compute.
    """
    gguf = require("gguf", extra=_EXTRA)
    _refuse(config)
    if kind not in gguf.GGMLQuantizationType.__members__:
        raise ValueError(f"unknown kind {kind!r}; give one of ggml's, such as BF16, Q8_0 or Q4_K")
    writer = gguf.GGUFWriter(path, "t5encoder")
    _write_config(writer, config)
    for name in encoder_tensors(config.encoder_only()):
        tensor = state[name]
        is_plain = tensor.ndim == 1 or "relative_attention_bias" in name
        is_table = name == "shared.weight" and kind not in _KINDS.values()
        content, found = _packed(gguf, tensor.float(), "F32" if is_plain else "Q8_0" if is_table else kind)
        writer.add_tensor(_name(name), content, raw_dtype=found)
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


def _packed(gguf: Any, weight: Tensor, kind: str) -> tuple[np.ndarray, Any]:
    """A weight in a kind, as bytes or numbers, and gguf's name of the kind."""
    found = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        return weight.to(torch.float32 if kind == "F32" else torch.float16).numpy(), found
    if kind == "BF16":
        return weight.bfloat16().view(torch.uint8).numpy(), found
    ours = next((own for own, each in KINDS.items() if each.name == kind), None)
    if ours is not None:
        return pack(weight, ours).parts["weight"].numpy(), found
    try:
        return gguf.quants.quantize(weight.numpy(), found), found
    except NotImplementedError as error:
        raise ValueError(f"{kind} cannot be packed here: the package gguf can only unpack it") from error


def _name(name: str) -> str:
    """What llama.cpp calls a tensor."""
    module = name.removesuffix(".weight")
    if module in _OTHERS:
        return f"{_OTHERS[module]}.weight"
    _, _, layer, place = module.split(".", 3)
    return f"enc.blk.{layer}.{_PARTS[place]}.weight"


@cache
def _library() -> Any:
    """The package, which writes nothing from now on."""
    library = require("llama_cpp", extra=_EXTRA)
    library.llama_log_set(_say_nothing(library), ctypes.c_void_p(0))
    library.llama_backend_init()
    return library


@cache
def _say_nothing(library: Any) -> Any:
    return library.llama_log_callback(lambda level, text, data: None)
