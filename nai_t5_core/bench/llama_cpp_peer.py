"""llama.cpp's T5 encoder on the CPU, by the low-level interface of the package llama-cpp-python.

It reads a GGUF file of the same weights. Token ids are fed directly, so the file has no tokenizer.
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

from nai_t5_core.bench.gguf_files import EXTRA, write_gguf
from nai_t5_core.bench.peers import State, require
from nai_t5_core.facts.config import T5Config

LLAMA_CPP = "llama-cpp-python"
_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


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


@cache
def _library() -> Any:
    """The package, which writes nothing from now on."""
    library = require("llama_cpp", extra=EXTRA)
    library.llama_log_set(_say_nothing(library), ctypes.c_void_p(0))
    library.llama_backend_init()
    return library


@cache
def _say_nothing(library: Any) -> Any:
    return library.llama_log_callback(lambda level, text, data: None)
