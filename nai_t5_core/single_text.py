"""One text, token by token, on the CPU: a step that torch compiles, and that reads the weights as fast as memory does.

A step of a lone text is bound by memory, for it takes all of the decoder's weights and does little with each. Products
of one row get half of what the memory gives. Written as a multiplication and a sum, each becomes one pass over the
weight as it lies in memory, and the small operations between products join into a few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nai_t5_core.decoder import Decoder
from nai_t5_core.decoder_attention import CrossMemory, DecoderCache, bias_line
from nai_t5_core.layers import NoInit, residual_dtype, scaled

if TYPE_CHECKING:
    from nai_t5_core.model import T5

# Keys are filled up to this number, or its double and so on: each number of keys is compiled anew.
_FEWEST_KEYS = 128

# Lengths of prompts and texts that may meet, each of them compiled on its own.
_MOST_GRAPHS = 64


class SingleRow(NoInit):
    """``ops`` for a model that is compiled to compute one token at a time."""

    class Linear(NoInit.Linear):
        def forward(self, x: Tensor) -> Tensor:
            """[1, 1, in_features] to [1, 1, out_features]; not compiled, it would take a copy of the weight."""
            exact = residual_dtype(x.dtype)
            return (self.weight.to(exact) * x[0, 0].to(exact)).sum(-1).to(x.dtype)[None, None]


@dataclass(frozen=True)
class _SelfAttention:
    """Writes the token's keys and values to its slot and attends to all before it.

    Attributes:
        keys, values: [heads, slots, d_kv], of one layer.
        bias: [heads, slots], −∞ behind the token.
        slot: [1] int64.
        scale: what q·k is multiplied by.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    slot: Tensor
    scale: float

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys[:, self.slot] = k[0].transpose(0, 1)
        self.values[:, self.slot] = v[0].transpose(0, 1)
        return _attend(q, self.keys, self.values, self.bias, self.scale)


@dataclass(frozen=True)
class _CrossAttention:
    """Attends to the prompt: ``keys`` and ``values`` [heads, length, d_kv], ``bias`` [1, length] hides pads."""

    keys: Tensor
    values: Tensor
    bias: Tensor
    scale: float

    def __call__(self, q: Tensor) -> Tensor:
        return _attend(q, self.keys, self.values, self.bias, self.scale)


def _attend(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Tensor:
    """q [1, 1, heads, d_kv] over [heads, keys, d_kv]; in float32, which costs nothing where memory is what bounds."""
    exact = residual_dtype(q.dtype)
    logits = (keys.to(exact) * q[0, 0, :, None].to(exact)).sum(-1) * scale + bias
    return (logits.softmax(-1)[..., None] * values.to(exact)).sum(1).to(q.dtype)[None, None]


class SingleTextDecoder:
    """The decoder and head of a model, on the same weights, compiled for one text at a time.

    One block is compiled, at its first use, and runs as every block.

    Args:
        model: neither prepacked nor quantised.
        options: passed on to torch.compile.
    """

    def __init__(self, model: T5, **options: Any) -> None:
        self.config, self.dtype = model.config, model.dtype
        place: dict[str, Any] = {"device": "meta", "dtype": model.dtype}
        self.decoder = Decoder(model.config, model.layout, model.decoder_scales, SingleRow, **place)
        self.decoder.load_state_dict(model.decoder.state_dict(), assign=True)
        self.decoder.eval().requires_grad_(False)
        self.head = SingleRow.Linear(model.config.d_model, model.config.vocab_size, bias=False, **place)
        self.head.weight = nn.Parameter(model.lm_head.weight.detach(), requires_grad=False)
        graphs: dict[str, Any] = {
            "fullgraph": True,
            "dynamic": False,
            "recompile_limit": _MOST_GRAPHS,
            "isolate_recompiles": True,
        }
        self.run_block: Callable[..., Tensor] = torch.compile(_run_block, **graphs, **options)
        self.finish: Callable[[Tensor], Tensor] = torch.compile(self._finish, **graphs, **options)

    def _finish(self, residual: Tensor) -> Tensor:
        """The residual behind the last block to logits."""
        hidden = self.decoder.final_layer_norm(residual).to(self.dtype)
        logits: Tensor = self.head(scaled(hidden, self.config.head_scale))
        return logits


def _run_block(
    block: nn.Module, residual: Tensor, attend: _SelfAttention, attend_across: _CrossAttention, dtype: torch.dtype
) -> Tensor:
    out: Tensor = block(residual, attend, attend_across, dtype)
    return out


class SingleText:
    """A text that grows token by token.

    Args:
        decoder: of the model.
        memory: of one prompt.
        cache: for one text, just cleared.
    """

    def __init__(self, decoder: SingleTextDecoder, memory: CrossMemory, cache: DecoderCache) -> None:
        self.decoder, self.cache = decoder, cache
        self._scale = memory.scale
        exact = residual_dtype(decoder.dtype)
        length = memory.layers[0][0].shape[2]
        filling = keys_for(length) - length
        padding = (0, 0, 0, filling)
        self._prompt = [(F.pad(keys[0], padding), F.pad(values[0], padding)) for keys, values in memory.layers]
        bias = torch.zeros(1, length, dtype=exact) if memory.bias is None else memory.bias[0, 0].to(exact)
        self._prompt_bias = F.pad(bias, (0, filling), value=-torch.inf)
        self._lines = [bias_line(table.to(exact), cache.length) for table in decoder.decoder.bias_tables(decoder.dtype)]

    def logits(self, residual: Tensor) -> Tensor:
        """Appends a token: its embedding [1, 1, d_model], which is changed, to logits [1, 1, vocab_size]."""
        slot, layers = self.cache.append()
        length = self.cache.length
        # Contiguous, since a graph is compiled for one way that a tensor lies in memory.
        biases = [line[:, length - 1 - slot : 2 * length - 1 - slot].contiguous() for line in self._lines]
        at = torch.tensor([slot])
        for index, block in enumerate(self.decoder.decoder.block):
            bias = biases[index if self.decoder.decoder.bias_per_layer else 0]
            keys, values = layers[index]
            attend = _SelfAttention(keys[0], values[0], bias, at, self._scale)
            attend_across = _CrossAttention(*self._prompt[index], self._prompt_bias, self._scale)
            residual = self.decoder.run_block(block, residual, attend, attend_across, self.decoder.dtype)
        return self.decoder.finish(residual)


def keys_for(length: int) -> int:
    """How many keys a prompt or text of this length is filled up to."""
    return max(_FEWEST_KEYS, 1 << (length - 1).bit_length())
