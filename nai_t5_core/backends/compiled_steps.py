"""The decoder's step on the CPU under torch.compile, which fuses the small operations between the products.

A few blocks are compiled as one graph, which then runs all others, for texts and prompts of any length. The attention
of a few beams reads keys and values once for all of them, and the products of several texts are those of
:mod:`nai_t5_core.backends.onednn`.

A lone text is computed by other products. Its step is bound by memory, since it reads all of the decoder's weights for
one row; oneDNN's product of one row reaches half of the memory's bandwidth. Written as a multiplication and a sum, a
product is compiled into one pass over the weight as it lies in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.backends.compile_limit import compile_with_limit
from nai_t5_core.model.decoder import BlockInPlan, Decoder, run_blocks
from nai_t5_core.model.decoder_attention import CachedAttention, CachedLayer, CrossLayer, CrossMemory, DecoderCache
from nai_t5_core.model.layers import NoInit, residual_dtype
from nai_t5_core.model.t5 import T5Model

# Each number of beams is a graph, for single prompts and for several; this limits how many there may be.
_MOST_GRAPHS = 64


class SingleRow(NoInit):
    """``ops`` for a model that is compiled to compute one token at a time."""

    class Linear(NoInit.Linear):
        def forward(self, x: Tensor) -> Tensor:
            """[1, 1, in_features] to [1, 1, out_features]; uncompiled, it would allocate a copy of the weight."""
            exact = residual_dtype(x.dtype)
            return (self.weight.to(exact) * x[0, 0].to(exact)).sum(-1).to(x.dtype)[None, None]


class CompiledSteps:
    """The decoder's blocks, compiled at their first use, and a second decoder on the same weights for a lone text.

    Args:
        model: neither prepacked nor quantised; it may be prepacked later.
        blocks_at_once: see :func:`nai_t5_core.backends.compiled.compile_steps`.
        options: passed on to torch.compile.
    """

    # A multiple of a vector register, and never 1, which would be compiled anew.
    slots_at_once = 16

    def __init__(self, model: T5Model, blocks_at_once: int, **options: Any) -> None:
        blocks = model.config.num_decoder_layers
        # A divisor of the number of blocks, or the last few blocks would need another graph.
        self.blocks_at_once = max(size for size in range(1, blocks_at_once + 1) if blocks % size == 0)
        self._run_group: Callable[..., Tensor] = compile_with_limit(run_blocks, _MOST_GRAPHS, **options)
        place: dict[str, Any] = {"device": "meta", "dtype": model.dtype}
        self.single_decoder = Decoder(model.config, model.layout, model.decoder_scales, SingleRow, **place)
        self.single_decoder.load_state_dict(model.decoder.state_dict(), assign=True)
        self.single_decoder.eval().requires_grad_(False)
        head = SingleRow.Linear(model.config.d_model, model.config.vocab_size, bias=False, **place)
        head.weight = nn.Parameter(model.lm_head.weight.detach(), requires_grad=False)
        self.single_head: Callable[[Tensor], Tensor] = compile_with_limit(head, _MOST_GRAPHS, **options)

    def prepare(self, cache: DecoderCache, memory: CrossMemory) -> None:
        """See :class:`nai_t5_core.model.t5.StepRunner`."""
        _let_vary(cache.rows, 0)
        for keys_and_values in (*cache.layers, *memory.layers):
            for tensor in keys_and_values:
                _let_vary(tensor, 0, 2)

    def logits(self, model: T5Model, embeddings: Tensor, plan: CachedAttention, memory: CrossMemory) -> Tensor:
        """See :class:`nai_t5_core.model.t5.StepRunner`."""
        _let_vary(plan.slots, 0)
        is_single = embeddings.shape[:2] == (1, 1)
        decoder = self.single_decoder if is_single else model.decoder
        hidden = decoder(embeddings, plan, memory, model.dtype, self.run_blocks)
        return model.logits(hidden, self.single_head if is_single else None)

    def run_blocks(self, blocks: Iterable[BlockInPlan], residual: Tensor, dtype: torch.dtype) -> Tensor:
        """See :func:`nai_t5_core.model.decoder.run_blocks`."""
        # For a lone text groups were no faster.
        size = 1 if residual.shape[:2] == (1, 1) else self.blocks_at_once
        upcoming = iter(blocks)
        while group := tuple(itertools.islice(upcoming, size)):
            _let_vary(residual, 0)
            for _, attend, attend_across in group:
                assert isinstance(attend, CachedLayer) and isinstance(attend_across, CrossLayer)
                _let_vary(attend.bias, 0, 3)
                if attend_across.bias is not None:
                    _let_vary(attend_across.bias, 0, 3)
            residual = self._run_group(group, residual, dtype)
        return residual


def _let_vary(tensor: Tensor, *dimensions: int) -> None:
    """Marks dimensions whose sizes may vary without another compilation."""
    for dimension in dimensions:
        torch._dynamo.maybe_mark_dynamic(tensor, dimension)
