"""What a decoder's queries attend to: the text so far, and the prompt.

A batch is [prompts, queries]. When a whole text is read at once (training, scoring), the queries of a prompt are the
text's positions. In generation they are the last tokens of its beams: all beams of a prompt share its cross-attention
keys, and one set of cached keys in which a mask shows each beam its own ancestors. So nothing is copied for a beam,
and what reordering moves is that mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nai_t5_core.attention import Attend, distance_table, position_bias
from nai_t5_core.config import T5Config

# Queries [prompts, queries, heads, d_kv] to attention output of the same shape.
CrossAttend = Callable[[Tensor], Tensor]


class DecoderPlan(Protocol):
    """Self-attention of one call of the decoder. Attend takes [prompts, queries, heads, d_kv]."""

    def bias(self, index: int) -> Tensor:
        """Bias and mask of the layers that use bias table number ``index``: [1 or prompts, heads, queries, keys]."""
        ...

    def layer(self, index: int, bias: Tensor) -> Attend:
        """The attention function of a layer."""
        ...


def causal_table(weight: Tensor, max_distance: int) -> Tensor:
    """Bias by distance of a decoder's layer: [buckets, heads] to [heads, 2 · max_distance + 1].

    It is −∞ for keys ahead of the query, so that any window of it is a causal mask as well.
    """
    table = distance_table(weight, max_distance, bidirectional=False)
    is_ahead = torch.arange(table.shape[1], device=table.device) > max_distance
    return table.masked_fill(is_ahead, -torch.inf)


def attend_to(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """q [prompts, queries, heads, d_kv] over keys and values [prompts, heads, keys, d_kv]; result like q."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, bias, dropout, scale=scale).transpose(1, 2)


@dataclass(frozen=True)
class CausalAttention:
    """Every position of a text at once; each sees itself and what is before it.

    ``dropout`` is the share of attention weights that are set to zero, in training.
    """

    tables: Sequence[Tensor]
    length: int
    scale: float
    dropout: float = 0.0

    def bias(self, index: int) -> Tensor:
        return position_bias(self.tables[index], self.length)[None]

    def layer(self, index: int, bias: Tensor) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend_to(q, k.transpose(1, 2), v.transpose(1, 2), bias, self.scale, self.dropout)

        return attend


# ---------------------------------------------------------------------------------------------------------------------
# Cross-attention
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrossMemory:
    """What the decoder reads of the prompts: the keys and values of every layer, computed once.

    Attributes:
        layers: keys and values of each layer, [prompts, heads, length, d_kv] each.
        bias: [prompts, 1, 1, length], hides pad tokens; None where there are none.
        scale: what q·k is multiplied by.
        dropout: the share of attention weights that are set to zero, in training.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    bias: Tensor | None
    scale: float
    dropout: float = 0.0

    @property
    def prompts(self) -> int:
        return self.layers[0][0].shape[0]

    def layer(self, index: int) -> CrossAttend:
        """The attention function of a layer."""
        keys, values = self.layers[index]

        def attend(q: Tensor) -> Tensor:
            return attend_to(q, keys, values, self.bias, self.scale, self.dropout)

        return attend


def cross_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool [prompts, length] to what is added to the logits: [prompts, 1, 1, length]."""
    # The lowest finite number and not −∞: a prompt masked everywhere is then read evenly, as in the reference.
    hidden = torch.finfo(dtype).min
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, hidden)[:, None, None]


# ---------------------------------------------------------------------------------------------------------------------
# Step by step
# ---------------------------------------------------------------------------------------------------------------------


class DecoderCache:
    """The keys and values of a text as it grows: one tensor, allocated once and written in place.

    ``keys_values`` is [layers, 2, prompts, heads, length · beams, d_kv]; the beams of one position lie side by side.
    With several beams, ``visible`` [prompts, beams, length, beams] is True where a beam's text went through the beam of
    a position.

    Args:
        config: of the model.
        prompts, beams: texts that grow side by side; the beams of a prompt read the same encoder states.
        length: the largest number of tokens, the start token included.
        dtype: the model's compute dtype.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        config: T5Config,
        prompts: int,
        beams: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(prompts, beams, length) < 1:
            raise ValueError(f"a cache of {prompts} prompts, {beams} beams, {length} tokens; each must be at least 1")
        self.prompts, self.beams, self.length = prompts, beams, length
        shape = (config.num_decoder_layers, 2, prompts, config.num_heads, length * beams, config.d_kv)
        self.keys_values = torch.zeros(shape, dtype=dtype, device=device)
        self.slots = torch.arange(length * beams, device=device)
        self.own = torch.eye(beams, dtype=torch.bool, device=device)
        self.visible = torch.zeros(prompts, beams, length, beams, dtype=torch.bool, device=device)
        self.position = 0

    @property
    def nbytes(self) -> int:
        """Memory of the cached keys and values."""
        return self.keys_values.nbytes

    def fits(self, config: T5Config, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it is a cache for such a model."""
        layers, _, _, heads, _, d_kv = self.keys_values.shape
        sizes = (config.num_decoder_layers, config.num_heads, config.d_kv)
        return (layers, heads, d_kv) == sizes and self.keys_values.dtype == dtype and self.keys_values.device == device

    def clear(self, with_values: bool = False) -> None:
        """Begins anew; nothing is allocated.

        ``with_values`` also overwrites the keys and values with zeros, for steps of fixed shapes: they multiply what is
        not written yet by a probability of zero, which must not meet a NaN of an earlier text.
        """
        self.position = 0
        self.visible.zero_()
        if with_values:
            self.keys_values.zero_()

    def reorder(self, parents: Tensor) -> None:
        """Lets every beam go on from another beam of its prompt: [prompts, beams] int64. Keys and values stay."""
        index = parents[:, :, None, None].expand_as(self.visible)
        self.visible.copy_(self.visible.gather(1, index))

    def step(self, lines: Sequence[Tensor], scale: float, fixed_shapes: bool) -> CachedAttention:
        """The plan of the next step; see :func:`bias_line` for ``lines``.

        With ``fixed_shapes`` every step reads the whole cache under a mask, else only what is written.

        Raises:
            ValueError: the cache is full.
        """
        if self.position >= self.length:
            raise ValueError(f"the cache holds {self.length} tokens and is full; make a longer one")
        position, beams = self.position, self.beams
        keys = self.length if fixed_shapes else position + 1
        # A row of the bias is a window of the distance line: distance −position to begin with.
        first = (self.length - 1 - position) * beams
        rows = [line[:, first : first + keys * beams] for line in lines]
        self.visible[:, :, position] = self.own
        self.position += 1
        return CachedAttention(
            keys_values=self.keys_values[..., : keys * beams, :],
            slots=self.slots[position * beams : (position + 1) * beams],
            rows=rows,
            visible=self.visible[:, :, :keys].flatten(2) if beams > 1 else None,
            scale=scale,
        )


def bias_line(table: Tensor, length: int, beams: int) -> Tensor:
    """Bias of the distances −(length − 1) … length − 1, each once for every beam: [heads, (2 · length − 1) · beams]."""
    reach = table.shape[-1] // 2
    distances = torch.arange(1 - length, length, device=table.device).clamp(-reach, reach) + reach
    return table[:, distances].repeat_interleave(beams, dim=1)


@dataclass(frozen=True)
class CachedAttention:
    """One step: the last tokens write their keys and values to ``slots`` and attend to what they may see."""

    keys_values: Tensor
    slots: Tensor
    rows: Sequence[Tensor]
    visible: Tensor | None
    scale: float

    def bias(self, index: int) -> Tensor:
        row = self.rows[index][None, :, None]
        return row if self.visible is None else row.masked_fill(~self.visible[:, None], -torch.inf)

    def layer(self, index: int, bias: Tensor) -> Attend:
        keys, values = self.keys_values[index].unbind(0)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys.index_copy_(2, self.slots, k.transpose(1, 2))
            values.index_copy_(2, self.slots, v.transpose(1, 2))
            return attend_to(q, keys, values, bias, self.scale)

        return attend
