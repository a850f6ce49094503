"""Every other encoder that ours is compared with, by name, and how it is called."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.bench.llama_cpp_peer import LLAMA_CPP, layers_of_llama_cpp, llama_cpp_encoder
from nai_t5_core.bench.openvino_peer import layers_of_openvino, openvino_encoder
from nai_t5_core.bench.peers import State, nai_t5_encoder, transformers_encoder
from nai_t5_core.facts.config import T5Config


@dataclass(frozen=True)
class Implementation:
    """How a package's encoder is built and called, where its layers are, and what passes between them."""

    build: Callable[[T5Config, State, torch.dtype], nn.Module]
    forward: Callable[[nn.Module, Tensor, Tensor | None], Tensor]
    layers: Callable[[Any], nn.ModuleList]
    residual: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Peer:
    """A built peer. A call maps [batch, length] ids, and a mask or None, to [batch, length, d_model]."""

    name: str
    version: str
    model: nn.Module
    implementation: Implementation

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.implementation.forward(self.model, ids, mask)

    def residuals(self, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """The residual stream before the first layer and after each: layers + 1 tensors [batch, length, d_model]."""
        layers, residual = self.implementation.layers(self.model), self.implementation.residual
        states: list[Tensor] = []
        hooks = [layers[0].register_forward_pre_hook(lambda _, inputs: states.append(residual(inputs[0])))]
        hooks += [layer.register_forward_hook(lambda _, __, out: states.append(residual(out))) for layer in layers]
        try:
            self(ids, mask)
        finally:
            for hook in hooks:
                hook.remove()
        return states


def build_peer(name: str, config: T5Config, state: State, dtype: torch.dtype) -> Peer:
    """A peer by name, on the CPU.

    Raises:
        ValueError: no such peer, its package is not installed, or it cannot run this config or dtype; the message says
            which.
    """
    if name not in _PEERS:
        raise ValueError(f"unknown peer {name!r}; allowed: {', '.join(_PEERS)}")
    model = _PEERS[name].build(config, state, dtype)
    return Peer(name, importlib.metadata.version(name), model, _PEERS[name])


def _call_transformers(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    hidden: Tensor = model(input_ids=ids, attention_mask=None if mask is None else mask.long()).last_hidden_state
    return hidden


def _call_nai_t5(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    hidden: Tensor = model(ids, input_mask=None if mask is None else mask.bool())
    return hidden


def _residual_of_transformers(value: Any) -> Tensor:
    residual: Tensor = value[0] if isinstance(value, tuple) else value
    return residual


def _residual_of_nai_t5(value: Any) -> Tensor:
    """The residual from a layer's output: nai-t5 passes the residual and what is yet to be added as a pair.

    The first layer's input has no residual.
    """
    added, residual = value
    total: Tensor = added if residual is None else added.to(residual.dtype) + residual
    return total


def _call_openvino(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    hidden: Tensor = model(ids, torch.ones_like(ids) if mask is None else mask.long())
    return hidden


def _call_llama_cpp(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    hidden: Tensor = model(ids, mask)
    return hidden


_PEERS = {
    "transformers": Implementation(
        transformers_encoder, _call_transformers, lambda model: model.encoder.block, _residual_of_transformers
    ),
    "nai-t5": Implementation(nai_t5_encoder, _call_nai_t5, lambda model: model.layers, _residual_of_nai_t5),
    "openvino": Implementation(openvino_encoder, _call_openvino, layers_of_openvino, _residual_of_transformers),
    LLAMA_CPP: Implementation(llama_cpp_encoder, _call_llama_cpp, layers_of_llama_cpp, _residual_of_transformers),
}
PEERS = tuple(_PEERS)
