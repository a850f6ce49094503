"""What a decoder's queries attend to: the text so far, and the prompt.

A batch is [prompts, queries]. When a whole text is read at once (training, scoring), the queries of a prompt are the
text's positions. In generation they are the last tokens of its beams. All beams of a prompt share its cross-attention
keys and one cache, in which a mask shows each beam the tokens of its own text. So keys and values that beams have in
common are stored once, and reordering the beams changes that mask alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nai_t5_core.facts.config import T5Config
from nai_t5_core.model.attention import Attend, aligned, distance_table, position_bias, sdpa
from nai_t5_core.model.layers import residual_dtype

# Queries [prompts, queries, heads, d_kv] to attention output of the same shape.
CrossAttend = Callable[[Tensor], Tensor]

# The most queries for which a compiled step computes attention query by query; for more it calls torch's kernel.
_MOST_SPELLED_OUT = 8


class DecoderPlan(Protocol):
    """Self-attention of one call of the decoder. Its attention functions take [prompts, queries, heads, d_kv]."""

    def bias(self, index: int) -> Tensor:
        """Bias and mask of the layers that use bias table number ``index``: [1 or prompts, heads, queries, keys]."""
        ...

    def layer(self, index: int, bias: Tensor) -> Attend:
        """The attention function of a layer."""
        ...


def causal_table(weight: Tensor, max_distance: int) -> Tensor:
    """Bias by distance of a decoder's layer: [buckets, heads] to [heads, 2 · max_distance + 1].

    It is −∞ for keys ahead of the query, so that a bias made of it is the causal mask as well.
    """
    table = distance_table(weight, max_distance, bidirectional=False)
    is_ahead = torch.arange(table.shape[1], device=table.device) > max_distance
    return table.masked_fill(is_ahead, -torch.inf)


def attend_to(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """q [prompts, queries, heads, d_kv] over keys and values [prompts, heads, keys, d_kv]; result like q."""
    if q.is_cpu and dropout == 0:
        if torch.compiler.is_compiling() and q.shape[1] <= _MOST_SPELLED_OUT:
            return _attend_one_by_one(q, keys, values, bias, scale)
        if q.shape[1] == 1 and q.dtype in (torch.bfloat16, torch.float16):
            return _attend_in_float32(q, keys, values, bias, scale)
    return sdpa(q.transpose(1, 2), keys, values, bias, scale, dropout).transpose(1, 2)


def _attend_in_float32(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """:func:`attend_to` for a single query, for which torch's half-precision kernel takes up to four times longer."""
    logits = torch.matmul(q.transpose(1, 2).float(), keys.float().transpose(-1, -2)) * scale
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    return torch.matmul(weights, values.float()).to(q.dtype).transpose(1, 2)


def _attend_one_by_one(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """:func:`attend_to` as products and sums, which a compiler fuses, so that keys and values are read only once."""
    exact = residual_dtype(q.dtype)
    keys, values = keys.to(exact), values.to(exact)
    outputs = []
    for query in range(q.shape[1]):
        logits = (keys * q[:, query, :, None].to(exact)).sum(dim=-1) * scale
        if bias is not None:
            logits = logits + bias[:, :, min(query, bias.shape[2] - 1)].to(exact)
        outputs.append((logits.softmax(dim=-1)[..., None] * values).sum(dim=-2))
    return torch.stack(outputs, dim=1).to(q.dtype)


@dataclass(frozen=True, eq=False)
class CausalAttention:
    """Self-attention of all positions of a text at once; each sees itself and those before it.

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


@dataclass(frozen=True, eq=False)
class CrossMemory:
    """The keys and values of every layer for the prompts, computed once and read by cross-attention at every step.

    Attributes:
        layers: keys and values of each layer, [prompts, heads, length, d_kv] each.
        bias: [prompts, 1, 1, length], hides pad tokens; None where there are no pad tokens.
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

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def layer(self, index: int) -> CrossAttend:
        """The attention function of a layer."""
        return CrossLayer(*self.layers[index], self.bias, self.scale, self.dropout)


@dataclass(frozen=True, eq=False)
class CrossLayer:
    """Cross-attention of one layer; see :class:`CrossMemory`. A class, not a closure: compilers see its fields."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None
    scale: float
    dropout: float

    def __call__(self, q: Tensor) -> Tensor:
        return attend_to(q, self.keys, self.values, self.bias, self.scale, self.dropout)


def cross_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask [prompts, length] as the bias that is added to the logits: [prompts, 1, 1, length]."""
    # The lowest finite number and not −∞: a fully masked prompt is then read evenly, as in transformers.
    hidden = torch.finfo(dtype).min
    length = mask.shape[1]
    mask = F.pad(mask, (0, aligned(length) - length))
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, hidden)[:, None, None, :length]


# ---------------------------------------------------------------------------------------------------------------------
# Step by step
# ---------------------------------------------------------------------------------------------------------------------


class DecoderCache:
    """The keys and values of a text as it grows: one tensor, allocated once and written in place.

    ``keys_values`` is [layers, 2, prompts, heads, slots, d_kv], with a slot for every token of every beam of a prompt.
    A token goes into the first slot that no beam reads. The slots of a beam that is given up are used again. Beams
    mostly differ in their last few tokens only, so few of the slots are in use, and only those are read.

    ``positions`` [prompts, slots] is the position in its text of each slot's token, and ``visible``
    [prompts, beams, slots] is True where a slot's token belongs to the text of a beam.

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
        # Rounded up to the alignment of torch's attention; slots that no text needs stay invisible.
        slots = aligned(length * beams)
        shape = (config.num_decoder_layers, 2, prompts, config.num_heads, slots, config.d_kv)
        self.keys_values = torch.empty(shape, dtype=dtype, device=device)
        # A view for each layer: a compiler copies the whole tensor to write into a part of it.
        self.layers = [(keys, values) for keys, values in self.keys_values]
        self.positions = torch.zeros(prompts, slots, dtype=torch.int64, device=device)
        self.visible = torch.zeros(prompts, beams, slots, dtype=torch.bool, device=device)
        self.own = torch.eye(beams, dtype=torch.bool, device=device).expand(prompts, beams, beams)
        self.rows = torch.arange(prompts, device=device)[:, None]
        self.position = self.used = 0

    @property
    def nbytes(self) -> int:
        """Memory of the cached keys and values."""
        return self.keys_values.nbytes

    @property
    def written_nbytes(self) -> int:
        """Memory of the slots that were used since :meth:`clear`."""
        return self.nbytes // self.slots * self.used

    def fits(self, config: T5Config, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the cache has the sizes, dtype and device of a model."""
        layers, _, _, heads, _, d_kv = self.keys_values.shape
        sizes = (config.num_decoder_layers, config.num_heads, config.d_kv)
        return (layers, heads, d_kv) == sizes and self.keys_values.dtype == dtype and self.keys_values.device == device

    # In inference mode, since a cache that was made in inference mode can be changed only there.
    @torch.inference_mode()
    def clear(self) -> None:
        """Forgets all texts, for use by the next generation; nothing is allocated."""
        self.position = self.used = 0
        self.visible.zero_()

    @torch.inference_mode()
    def reorder(self, parents: Tensor) -> None:
        """Makes every beam continue the text of beam ``parents`` [prompts, beams] int64 of its prompt.

        Keys and values stay where they are.
        """
        index = parents[:, :, None].expand_as(self.visible)
        self.visible.copy_(self.visible.gather(1, index))

    @property
    def slots(self) -> int:
        """How many tokens fit for each prompt, of all its beams together."""
        return self.positions.shape[1]

    def step(self, lines: Sequence[Tensor], scale: float, granularity: int = 1) -> CachedAttention:
        """The plan of the next step; see :func:`bias_line` for ``lines``.

        It reads the slots in use, their number rounded up to a multiple of ``granularity``.

        Raises:
            ValueError: the cache is full.
        """
        self._refuse_if_full()
        slots = self._take_slots()
        self._use(self._slots_to_read(slots, granularity))
        # Index into the bias line for each slot; the line's last entry is −∞, for slots that a beam does not see.
        places = self.positions[:, None, : self.used] + (self.length - 1 - self.position)
        places = torch.where(self.visible[:, :, : self.used], places, 2 * self.length - 1)
        self.position += 1
        return CachedAttention(self.layers, self.rows, slots, lines, places, scale)

    def _refuse_if_full(self) -> None:
        if self.position >= self.length:
            raise ValueError(f"the cache holds {self.length} tokens and is full; make a longer one")

    def _take_slots(self) -> Tensor:
        """A free slot for the next token of every beam: [prompts, beams]."""
        candidates = self.visible[:, :, : self.used + self.beams]
        slots = candidates.any(dim=1).byte().sort(dim=1, stable=True).indices[:, : self.beams]
        # Always contiguous: a compiler compiles anew for other strides, even where a size is 1.
        slots = slots.clone(memory_format=torch.contiguous_format)
        self.visible.scatter_(2, slots[:, None].expand_as(self.own), self.own)
        self.positions.scatter_(1, slots, self.position)
        return slots

    def _slots_to_read(self, taken: Tensor, granularity: int) -> int:
        if granularity >= self.slots:
            return self.slots  # all of them, without waiting for an accelerator
        in_use = int(taken.max()) + 1
        return min(self.slots, -(-in_use // granularity) * granularity)

    def _use(self, slots: int) -> None:
        """Takes more slots into use and zeroes them: they are read with weight 0 before they are written."""
        if slots > self.used:
            self.keys_values[..., self.used : slots, :].zero_()
            self.used = slots


def bias_line(table: Tensor, length: int) -> Tensor:
    """Bias of the distances −(length − 1) … length, [heads, 2 · length]; that of distances above 0 is −∞."""
    reach = table.shape[-1] // 2
    distances = torch.arange(1 - length, length + 1, device=table.device).clamp(-reach, reach) + reach
    return table[:, distances]


@dataclass(frozen=True, eq=False)
class CachedAttention:
    """One step: the keys and values of the last tokens go into the cache, and each attends to its own text.

    Attributes:
        layers: keys and values of every layer, [prompts, heads, slots, d_kv] each.
        rows, slots: where the last tokens go, [prompts, 1] and [prompts, beams].
        lines: the bias by distance of every layer that has its own, see :func:`bias_line`.
        places: [prompts, beams, slots in use], the index into the line for each slot.
        scale: what q·k is multiplied by.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    rows: Tensor
    slots: Tensor
    lines: Sequence[Tensor]
    places: Tensor
    scale: float

    def bias(self, index: int) -> Tensor:
        return self.lines[index][:, self.places].transpose(0, 1)

    def layer(self, index: int, bias: Tensor) -> Attend:
        return CachedLayer(*self.layers[index], self.rows, self.slots, bias, self.scale)


@dataclass(frozen=True, eq=False)
class CachedLayer:
    """One layer of :class:`CachedAttention`. A lone query may come in several copies, of which the first is written."""

    keys: Tensor
    values: Tensor
    rows: Tensor
    slots: Tensor
    bias: Tensor
    scale: float

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        beams, used = self.slots.shape[1], self.bias.shape[-1]
        self.keys[self.rows, :, self.slots] = k[:, :beams]
        self.values[self.rows, :, self.slots] = v[:, :beams]
        return attend_to(q, self.keys[:, :, :used], self.values[:, :, :used], self.bias, self.scale)
