"""Attention over a packed row in one fused kernel: the bias is looked up and the mask is blockwise.

Neither a [heads, length, length] bias nor a mask of that size is ever in memory: the kernel reads the bias from the
table by clamped distance, and skips every block of keys that no query of a block may see.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nai_t5_core.model.attention import Attend
from nai_t5_core.model.packing import DocumentGroup

# Rows and keys are masked in squares of this size; the packed row is filled up to a multiple of it.
BLOCK = 128
# torch compiles a size of 1 on its own, while all larger sizes share one graph. So even a short row gets two blocks;
# nothing is computed for a block without documents.
LEAST_BLOCKS = 2

# By the largest size of heads: with these, flex's kernels spill no registers in half precision, and fit into the shared
# memory of every card since compute capability 8.0. By torch's own choice they spill. What is named "fwd_…" does not
# reach the backward.
_CUDA_OPTIONS: tuple[tuple[int, dict[str, Any]], ...] = (
    (64, {"fwd_num_warps": 8}),
    (128, {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 32, "fwd_num_warps": 8, "fwd_num_stages": 2}),
)

# The document number of a row that is no key.
_NO_KEY = -1

# For every block of queries: how many blocks of keys are partly visible [1, 1, blocks], and which [1, 1, blocks,
# blocks]; how many are wholly visible, and which. Then the same four for every block of keys, for the backward.
Blocks = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class FlexAttention:
    """Every document of a packed row attends to its own keys, in one call for the whole row.

    The same mathematics as :class:`nai_t5_core.model.attention.DocumentAttention`, and like it made once per batch; all
    layers share the mask. On the CPU there is no backward: torch has none for flex attention there.

    Attributes:
        rows: [4, blocks · BLOCK] int32: the document of each row as a query, its document as a key (−1: no key), its
            position in the prompt, and 1 where the prompt is fully masked and so attends evenly to all its rows.
        blocks: which blocks of keys each block of queries looks at.
        tokens: rows that are computed.
        scale: what q·k is multiplied by.
        kernel_options: passed on to torch's flex_attention; None for our own choice.
    """

    rows: Tensor
    blocks: Blocks
    tokens: int
    scale: float
    kernel_options: dict[str, Any] | None = None

    @classmethod
    def over(
        cls,
        groups: Sequence[DocumentGroup],
        scale: float,
        device: torch.device | str = "cpu",
        kernel_options: Mapping[str, Any] | None = None,
        bucket: int | None = None,
    ) -> FlexAttention:
        """The plan for the documents of a packed row.

        Args:
            bucket: the number of tokens that the row is padded to, a multiple of BLOCK; by default the next multiple.
        """
        tokens = groups[-1].stop if groups else 0
        length = max(-(-tokens // BLOCK), LEAST_BLOCKS) * BLOCK if bucket is None else bucket
        rows = _number_rows(groups, length, device)
        tokens = tokens if bucket is None else bucket
        return cls(rows, visible_blocks(rows), tokens, scale, None if kernel_options is None else dict(kernel_options))

    def layer(self, table: Tensor) -> Attend:
        if self.tokens < 2:
            return _attend_to_itself
        # The compiler never fuses an as_strided view into its reader, and torch's C++ kernel needs a finished table.
        table = table.contiguous().as_strided(table.shape, (table.shape[1], 1))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            options = self._options(q)
            if torch.compiler.is_compiling():
                return packed_attention(q, k, v, table, self.rows, self.blocks, self.scale, options)
            self._share_one_graph(q, k, v)
            return _compiled()(q, k, v, table, self.rows, self.blocks, self.scale, options)

        return attend

    def _options(self, q: Tensor) -> dict[str, Any] | None:
        if self.kernel_options is not None or not q.is_cuda:
            return self.kernel_options
        return next((options for size, options in _CUDA_OPTIONS if q.shape[-1] <= size), None)

    def _share_one_graph(self, *heads: Tensor) -> None:
        """Marks the sizes that differ from batch to batch, so that all of them are compiled as one."""
        mark = torch._dynamo.maybe_mark_dynamic
        mark(self.rows, 1)
        for tensor in heads:
            mark(tensor, 0)
        for tensor in self.blocks:
            mark(tensor, list(range(2, tensor.ndim)))


def _attend_to_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """For a packed row of one token, or none."""
    return v


# ---------------------------------------------------------------------------------------------------------------------
# The kernel
# ---------------------------------------------------------------------------------------------------------------------


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    rows: Tensor,
    blocks: Blocks,
    scale: float,
    kernel_options: Any,
) -> Tensor:
    """[tokens, heads, d_kv] each, and a [heads, distances] bias table, to [tokens, heads, d_kv].

    Raises:
        RuntimeError: it is not being compiled. Uncompiled, torch's flex_attention is slow and stores all logits.
    """
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "flex attention is only of use compiled, and torch did not compile it: the compiler is switched off, or a "
            "dispatch mode such as FlopCounterMode is active; use attention='sdpa' here"
        )
    query_document, key_document, position, is_even = rows.unbind()
    reach = table.shape[-1] // 2

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = (position[key] - position[query]).clamp(-reach, reach)
        return score + table[head, distance + reach]

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query_document[query] == key_document[key]

    tokens, length = q.shape[0], blocks[0].shape[-1] * BLOCK
    mask = BlockMask((length, length), *blocks, (BLOCK, BLOCK), is_visible)
    # A fully masked prompt attends evenly: its queries are zeros, and all its positions 0, so all its logits are equal.
    q, k, v = q[None], k[None], v[None]
    q = q.masked_fill(is_even[None, :tokens, None, None] != 0, 0)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, length - tokens)).transpose(1, 2) for x in (q, k, v))
    out = flex_attention(q, k, v, score_mod=biased, block_mask=mask, scale=scale, kernel_options=kernel_options)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)[0, :tokens]


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    # fullgraph: beyond torch's limit of compiled variants this raises an error, instead of silently running uncompiled.
    # dynamic=False: only sizes that are marked as dynamic are. With more symbolic sizes, torch 2.13's C++ kernel for
    # the CPU does not compile.
    return torch.compile(packed_attention, fullgraph=True, dynamic=False)


# ---------------------------------------------------------------------------------------------------------------------
# The descriptions of rows and blocks that the kernel reads
# ---------------------------------------------------------------------------------------------------------------------


def _number_rows(groups: Sequence[DocumentGroup], length: int, device: torch.device | str) -> Tensor:
    """[4, length] int32, see :class:`FlexAttention`. Rows behind the last document see nothing and are not seen."""
    rows = torch.zeros(4, length, dtype=torch.int32)
    query_document, key_document, position, is_even = rows
    key_document.fill_(_NO_KEY)
    documents = 0
    for group in groups:
        span = slice(group.start, group.stop)
        row = torch.arange(group.stop - group.start, dtype=torch.int32)
        place = row % group.queries
        query_document[span] = documents + row // group.queries
        if group.keys == 0:
            key_document[span] = query_document[span]
            is_even[span] = 1
        else:
            is_key = (place >= group.key_start) & (place < group.key_start + group.keys)
            key_document[span] = torch.where(is_key, query_document[span], _NO_KEY)
            position[span] = place
        documents += group.count
    query_document[groups[-1].stop if groups else 0 :] = documents
    rows = rows.to(device, non_blocking=True)
    documents = 0
    for group in groups:
        # Done on the device, where these tensors are already: copying them to the CPU would wait for the device.
        if group.positions is not None and group.key_rows is not None:
            _, key_document, position, _ = rows[:, group.start : group.stop]
            key_document.fill_(_NO_KEY).index_fill_(0, group.key_rows, documents)
            position.copy_(group.positions)
        documents += group.count
    return rows


def visible_blocks(rows: Tensor) -> Blocks:
    """Which blocks of keys each block of queries must look at, from the first and last document of each block.

    Documents lie in order, so a block of queries may see a block of keys only if their ranges of documents overlap.
    This may include a block whose keys the mask all hides, but never omits one, and needs no mask of [rows, rows].
    """
    query_document, key_document = rows[0].unflatten(0, (-1, BLOCK)), rows[1].unflatten(0, (-1, BLOCK))
    first, last = query_document[:, :1], query_document[:, -1:]
    # A block without keys gets a range that overlaps no other: from beyond the last document to −1.
    beyond = rows.shape[1]
    key_first = key_document.masked_fill(key_document == _NO_KEY, beyond).amin(dim=1)
    key_last = key_document.amax(dim=1)
    some = (first <= key_last) & (key_first <= last)
    whole = (first == last) & (key_document.amin(dim=1) == first) & (key_last == first)
    part = some & ~whole
    return *_in_order(part), *_in_order(whole), *_in_order(part.t()), *_in_order(whole.t())


def _in_order(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[blocks, blocks] bool to the number of True in each row, and the indices of each row with those of True first."""
    places = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32)[None, None], places.int()[None, None]
