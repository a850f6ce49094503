"""transformers' encoder as OpenVINO runs it on the CPU."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.bench.peers import State, require, transformers_encoder
from nai_t5_core.facts.config import T5Config

_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class _Traced(nn.Module):
    """What is given to OpenVINO: ids and mask as two tensors, and one result."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden


class OpenVINOEncoder(nn.Module):
    """A compiled graph, called as a module is. It holds its own weights, and has no layers that could be looked into.

    Args:
        compiled: OpenVINO's compiled model, of ids and mask [batch, length].
    """

    def __init__(self, compiled: Any) -> None:
        super().__init__()
        self._compiled = compiled

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[batch, length] int64 ids and mask to float32 hidden states [batch, length, d_model]."""
        return torch.from_numpy(self._compiled([ids.numpy(), mask.numpy()])[0].copy())


def openvino_encoder(config: T5Config, state: State, dtype: torch.dtype) -> nn.Module:
    """transformers' encoder, converted by OpenVINO and compiled for this CPU with as many threads as torch has.

    It is converted from float32; in bfloat16 it multiplies in bfloat16 where OpenVINO chooses to.

    Raises:
        ValueError: OpenVINO or transformers is not installed, or another dtype.
    """
    if dtype not in _PRECISIONS:
        raise ValueError(f"OpenVINO's CPU plugin computes in float32 and bfloat16, not in {dtype}")
    openvino = require("openvino", extra="openvino")
    encoder = _Traced(transformers_encoder(config, state, torch.float32))
    example = torch.ones(2, 11, dtype=torch.long)
    with warnings.catch_warnings(), torch.no_grad():
        # Of numbers that tracing takes for constants: none of them depends on the length.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        model = openvino.convert_model(encoder, example_input={"ids": example, "mask": example})
    options = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        # It would pin the calling thread to one processor, and with it the threads of whoever computes next.
        "ENABLE_CPU_PINNING": False,
    }
    return OpenVINOEncoder(openvino.Core().compile_model(model, "CPU", options))


def layers_of_openvino(model: nn.Module) -> nn.ModuleList:
    """Raises a ValueError: a compiled graph has no layers."""
    raise ValueError("OpenVINO compiles the whole encoder, whose layers cannot be looked into; leave --per-layer out")
