"""Relative position bias, and attention over packed documents or under a dense mask.

A plan is made once per batch (``DocumentAttention`` or ``DenseAttention``); ``plan.layer(table)`` gives the function
that one layer calls with its queries, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nai_t5_core.facts.config import T5Config
from nai_t5_core.model.layers import add_sublayer, scaled
from nai_t5_core.model.packing import DocumentGroup

# Queries, keys and values [tokens, heads, d_kv] to attention output [tokens, heads, d_kv].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# torch may otherwise choose cuDNN's kernel on CUDA. With a mask, that kernel silently misread float32 values and gave
# NaN gradients; flash attention takes no mask at all.
_CUDA_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# torch's efficient kernel reads a bias in runs of 8 numbers. A bias whose row width is no multiple of 8 is copied in
# every call; a bias that does not start at a multiple of 8 is an error, or crashes the whole device.
BIAS_ALIGNMENT = 8


# ---------------------------------------------------------------------------------------------------------------------
# Relative position bias
# ---------------------------------------------------------------------------------------------------------------------


def relative_position_bucket(distance: Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket number of each distance (key position − query position); same shape as ``distance``, int64.

    Small distances have buckets of their own, larger ones share buckets of logarithmically growing width, and all
    beyond ``max_distance`` share the last (Raffel et al. 2020, section 2.1). Without ``bidirectional``, keys ahead of
    the query count as distance 0, since a causal mask hides them.
    """
    offset = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    # float32 on purpose: the published models were trained with buckets rounded this way.
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (growth * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, logarithmic)


def distance_table(weight: Tensor, max_distance: int, bidirectional: bool = True) -> Tensor:
    """Bias by distance: [buckets, heads] to [heads, 2 · max_distance + 1], for distances −max_distance … max_distance.

    Buckets are constant beyond ``max_distance``, so this table serves sequences of any length.
    """
    # torch.compile traces into lru_cache with a warning, and folds the computation into a constant without the cache.
    find = _buckets_by_distance if torch.compiler.is_compiling() else _cached_buckets_by_distance
    return weight[find(max_distance, bidirectional, weight.shape[0], weight.device)].t()


def _buckets_by_distance(max_distance: int, bidirectional: bool, num_buckets: int, device: torch.device) -> Tensor:
    distances = torch.arange(-max_distance, max_distance + 1, device=device)
    return relative_position_bucket(distances, bidirectional, num_buckets, max_distance)


# Cached: a dozen small operations whose result never changes. Made outside inference mode, since autograd refuses
# inference tensors: a first call under inference mode would break later calls with gradients.
@lru_cache
@torch.inference_mode(False)
def _cached_buckets_by_distance(
    max_distance: int, bidirectional: bool, num_buckets: int, device: torch.device
) -> Tensor:
    return _buckets_by_distance(max_distance, bidirectional, num_buckets, device)


def aligned(width: int) -> int:
    """The next multiple of :data:`BIAS_ALIGNMENT`."""
    return -(-width // BIAS_ALIGNMENT) * BIAS_ALIGNMENT


def position_bias(table: Tensor, queries: int, keys: int | None = None, key_start: int = 0) -> Tensor:
    """Bias of a run of queries and a run of keys: [heads, 2 · max_distance + 1] to [heads, queries, keys].

    ``key_start`` is the position of the first key relative to the first query; by default the keys have the positions
    of the queries. The result is a view into rows of :func:`aligned` width.
    """
    reach = table.shape[-1] // 2
    keys = queries if keys is None else keys
    width = aligned(keys)
    # Row q of the result is the bias of consecutive distances from −q on: overlapping windows of one line, copied once.
    distances = torch.arange(key_start - queries + 1, key_start + width, device=table.device)
    windows = table[:, distances.clamp(-reach, reach) + reach].unfold(-1, width, 1)
    # Not flip(), whose result may have rows and columns exchanged in memory.
    return windows.index_select(-2, torch.arange(queries - 1, -1, -1, device=table.device))[..., :keys]


def scattered_bias(table: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Bias between arbitrary positions: [queries] and [keys] to [heads, queries, keys], as :func:`position_bias`."""
    reach = table.shape[-1] // 2
    distance = (F.pad(keys, (0, aligned(len(keys)) - len(keys)))[None, :] - queries[:, None]).clamp(-reach, reach)
    return table[:, distance + reach].contiguous()[..., : len(keys)]


# ---------------------------------------------------------------------------------------------------------------------
# Plans: what attends to what
# ---------------------------------------------------------------------------------------------------------------------


class AttentionPlan(Protocol):
    """Which tokens of a batch attend to which; a layer adds its bias table."""

    def layer(self, table: Tensor) -> Attend:
        """The attention function of a layer with this [heads, distances] bias table in the compute dtype."""
        ...


class LateAttend:
    """An attention function that is made when it is first called."""

    def __init__(self, make: Callable[[], Attend]) -> None:
        self._make = make
        self._made: Attend | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._made is None:
            self._made = self._make()
        return self._made(q, k, v)


@dataclass(frozen=True, eq=False)
class DocumentAttention:
    """Every document of a packed row attends to its own keys: one SDPA call for each group of documents of one shape.

    ``dropout`` is the share of attention weights that are set to zero in training. ``by_kernels`` allows a block that
    our CPU kernels compute to compute its attention by them as well.
    """

    groups: Sequence[DocumentGroup]
    scale: float
    dropout: float = 0.0
    by_kernels: bool = True

    def layer(self, table: Tensor) -> Attend:
        # With gradients the biases are computed here, outside the blocks, whose forward checkpointing may run twice.
        return DocumentLayer(self, table, self.biases(table) if torch.is_grad_enabled() else None)

    @cached_property
    def documents(self) -> Tensor | None:
        """Every document, for our CPU kernels, [documents, 4] int64: first row, rows, first key in the document, keys.

        None where the kernels are not to compute attention, or a document has holes in its mask or no keys, which these
        four numbers cannot describe.
        """
        if not self.by_kernels or any(group.keys == 0 or group.positions is not None for group in self.groups):
            return None
        rows = [
            (start, group.queries, group.key_start, group.keys)
            for group in self.groups
            for start in range(group.start, group.stop, group.queries)
        ]
        return torch.tensor(rows, dtype=torch.long).reshape(-1, 4)

    def biases(self, table: Tensor) -> list[Tensor]:
        """The bias of every group, [heads, queries, keys]."""
        longest = max([1, *(group.queries for group in self.groups if group.positions is None)])
        whole = position_bias(table, longest)
        return [self._bias_of(group, table, whole) for group in self.groups]

    def attend(self, biases: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries, keys and values [tokens, heads, d_kv] to attention output [tokens, heads, d_kv]."""
        outputs = [self._attend_group(*item, q, k, v) for item in zip(self.groups, biases, strict=True)]
        # The row is empty where every prompt is masked and no pad row is computed.
        return q if not outputs else outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    def _bias_of(group: DocumentGroup, table: Tensor, whole: Tensor) -> Tensor:
        """[heads, queries, keys]; a view into ``whole``, the longest document's bias, where the view is aligned."""
        if group.positions is not None:
            return scattered_bias(table, group.positions, group.positions[group.key_rows])
        if group.key_start % BIAS_ALIGNMENT:
            return position_bias(table, group.queries, group.keys, group.key_start)
        return whole[:, : group.queries, group.key_start : group.key_start + group.keys]

    def _attend_group(self, group: DocumentGroup, bias: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = (group.count, group.queries)
        q, k, v = (x[group.start : group.stop].unflatten(0, shape) for x in (q, k, v))
        if group.keys == 0:
            return v.mean(dim=1, keepdim=True).expand_as(v).flatten(0, 1)
        if group.key_rows is None:
            keys = slice(group.key_start, group.key_start + group.keys)
            k, v = k[:, keys], v[:, keys]
        else:
            k, v = k[:, group.key_rows], v[:, group.key_rows]
        if group.keys == 1 and self.dropout == 0:
            # The only key gets all the weight. An empty negative prompt is such a document; this saves a kernel call.
            return v.expand_as(q).flatten(0, 1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = sdpa(q, k, v, bias.expand(group.count, *bias.shape), self.scale, self.dropout)
        return out.transpose(1, 2).flatten(0, 1)


class DocumentLayer:
    """:class:`DocumentAttention` with a layer's bias. Layers with a common bias share one instance.

    Attributes:
        plan: the documents, and which rows attend to which keys.
        table: the bias by distance, [heads, distances].
    """

    def __init__(self, plan: DocumentAttention, table: Tensor, biases: list[Tensor] | None = None) -> None:
        self.plan = plan
        self.table = table
        self._biases = biases

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._biases is None:
            self._biases = self.plan.biases(self.table)
        return self.plan.attend(self._biases, q, k, v)

    @cached_property
    def exact_table(self) -> Tensor:
        """The table in float32, for the kernels."""
        return self.table.float().contiguous()


@dataclass(frozen=True, eq=False)
class DenseAttention:
    """Attention over a padded batch with an arbitrary mask; ``mask`` is bool [batch, 1 or heads, query, key]."""

    mask: Tensor
    scale: float

    def layer(self, table: Tensor) -> Attend:
        batch, _, length, _ = self.mask.shape
        # The lowest finite number and not −∞: a fully masked row then attends evenly, as in transformers.
        hidden = torch.finfo(table.dtype).min
        bias = position_bias(table, aligned(length))[:, :length]
        mask = F.pad(self.mask, (0, aligned(length) - length))
        bias = bias.masked_fill(~mask, hidden)[..., :length]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.unflatten(0, (batch, length)).transpose(1, 2) for x in (q, k, v))
            return sdpa(q, k, v, bias, self.scale).transpose(1, 2).flatten(0, 1)

        return attend


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """torch's attention, on CUDA without its faulty kernels: q, k, v [batch, heads, tokens, d_kv]; the result like q.

    ``bias`` has the dtype of q, k and v, and can be expanded to [batch, heads, queries, keys].
    """
    with sdpa_kernel(_CUDA_KERNELS) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)


def logit_scale(config: T5Config) -> float:
    """What q·k is multiplied by: 1 for the published models."""
    return config.d_kv**-0.5 if config.scale_qk else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Modules: projections around the attention function
# ---------------------------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Self-attention with q, k, v and o as modules of their own (the separate layout).

    ``scale`` multiplies the input of o, and so the output.
    """

    def __init__(self, config: T5Config, ops: Any, has_bias: bool, scale: float = 1.0, **factory: Any) -> None:
        super().__init__()
        self.scale = scale
        self.heads, self.d_kv = config.num_heads, config.d_kv
        self.scale_qk = config.scale_qk
        self.q = ops.Linear(config.d_model, config.inner_dim, bias=False, **factory)
        self.k = ops.Linear(config.d_model, config.inner_dim, bias=False, **factory)
        self.v = ops.Linear(config.d_model, config.inner_dim, bias=False, **factory)
        self.o = ops.Linear(config.inner_dim, config.d_model, bias=False, **factory)
        if has_bias:
            self.relative_attention_bias = _bias_embedding(config, ops, **factory)

    def forward(self, hidden: Tensor, attend: Attend) -> Tensor:
        """[tokens, d_model] to [tokens, d_model]."""
        q, k, v = (projection(hidden).unflatten(-1, (self.heads, self.d_kv)) for projection in (self.q, self.k, self.v))
        out: Tensor = self.o(scaled(attend(q, k, v).flatten(-2), self.scale))
        return out

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        d_model = self.q.in_features
        nn.init.normal_(self.q.weight, std=query_std(d_model, self.d_kv, self.scale_qk), generator=generator)
        nn.init.normal_(self.k.weight, std=d_model**-0.5, generator=generator)
        nn.init.normal_(self.v.weight, std=d_model**-0.5, generator=generator)
        nn.init.normal_(self.o.weight, std=self.o.in_features**-0.5, generator=generator)


class FusedSelfAttention(nn.Module):
    """Self-attention with q, k and v in one matrix, one above the other in that order."""

    def __init__(self, config: T5Config, ops: Any, has_bias: bool, **factory: Any) -> None:
        super().__init__()
        self.heads, self.d_kv = config.num_heads, config.d_kv
        self.scale_qk = config.scale_qk
        self.qkv = ops.Linear(config.d_model, 3 * config.inner_dim, bias=False, **factory)
        self.o = ops.Linear(config.inner_dim, config.d_model, bias=False, **factory)
        if has_bias:
            self.relative_attention_bias = _bias_embedding(config, ops, **factory)

    def forward(self, hidden: Tensor, attend: Attend) -> Tensor:
        """[tokens, d_model] to [tokens, d_model]."""
        q, k, v = self.qkv(hidden).unflatten(-1, (3, self.heads, self.d_kv)).unbind(-3)
        out: Tensor = self.o(attend(q, k, v).flatten(-2))
        return out

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        d_model = self.qkv.in_features
        q, kv = self.qkv.weight.detach().split([self.o.in_features, 2 * self.o.in_features])
        nn.init.normal_(q, std=query_std(d_model, self.d_kv, self.scale_qk), generator=generator)
        nn.init.normal_(kv, std=d_model**-0.5, generator=generator)
        nn.init.normal_(self.o.weight, std=self.o.in_features**-0.5, generator=generator)


def _bias_embedding(config: T5Config, ops: Any, **factory: Any) -> nn.Embedding:
    embedding: nn.Embedding = ops.Embedding(config.relative_attention_num_buckets, config.num_heads, **factory)
    return embedding


def query_std(d_model: int, d_kv: int, scale_qk: bool) -> float:
    """Initial standard deviation of q's weight. T5 puts the 1/√d_kv that other models apply to the logits into it."""
    return d_model**-0.5 if scale_qk else (d_model * d_kv) ** -0.5


class SelfAttentionLayer(nn.Module):
    """Norm, self-attention, and the sum with the residual: ``block[i].layer[0]``.

    The attention's output comes multiplied by ``out_scale``; the sum divides by it.
    """

    def __init__(self, norm: nn.Module, attention: nn.Module, out_scale: float = 1.0) -> None:
        super().__init__()
        self.SelfAttention = attention
        self.layer_norm = norm
        self.out_scale = out_scale

    def forward(self, residual: Tensor, attend: Attend, dtype: torch.dtype) -> Tensor:
        """[tokens, d_model] residual to residual, changed in place in inference; ``dtype`` is the compute dtype."""
        out = self.SelfAttention(self.layer_norm(residual).to(dtype), attend)
        return add_sublayer(residual, out, self.out_scale)
