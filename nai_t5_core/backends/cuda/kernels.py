"""Triton kernels for what a layer computes between its products; the arguments are described in
:mod:`nai_t5_core.backends.cuda.launches`.

Sums are in float32 whatever the tensors' dtype, and every result is rounded once, when it is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nai_t5_core.backends.cuda.byte_rounding import faults_in, in_bytes, scale_of

# Numbers in a row of the document table, see nai_t5_core.backends.cuda.documents.document_table.
DOCUMENT_COLUMNS = tl.constexpr(5)


@triton.jit
def wait_for_inputs(overlaps: tl.constexpr) -> None:
    """Where launches overlap (from sm_90 on): waits for the end of those before.

    Memory that another launch writes or may still read must not be touched before this call.
    """
    if overlaps:
        tl.extra.cuda.gdc_wait()


@triton.jit
def start_next(overlaps: tl.constexpr) -> None:
    """Where launches overlap: lets the next one start once all programs of this one have come here, or ended.

    Kernels with little to do call it first. A product calls it when its sums are done: what starts earlier would wait
    in places of multiprocessors that this product's last programs, or those of the next, could use evenly.
    """
    if overlaps:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def attend(
    qkv: tl.tensor,
    table: tl.tensor,
    documents: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    heads: tl.constexpr,
    d_kv: tl.constexpr,
    reach: tl.constexpr,
    margin: tl.constexpr,
    query_block: tl.constexpr,
    key_block: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One block of queries of one head over all keys of their document, with a running softmax."""
    start_next(overlaps)
    wait_for_inputs(overlaps)
    head, block = tl.program_id(0), tl.program_id(1)
    document = documents + block * DOCUMENT_COLUMNS
    rows = tl.load(document + 1)
    # An unused row of a table of fixed size.
    if rows == 0:
        return
    start = tl.load(document).to(tl.int64)
    first_query = tl.load(document + 2)
    key_start = tl.load(document + 3)
    keys = tl.load(document + 4)
    # Without keys, attention is even over all rows of the document: logits of zeros, whatever is in the rows.
    is_even = keys == 0
    key_start = tl.where(is_even, 0, key_start)
    keys = tl.where(is_even, rows, keys)

    stride = 3 * heads * d_kv
    depth = tl.arange(0, d_kv)
    queries = first_query + tl.arange(0, query_block)
    in_document = (queries < rows)[:, None]
    base = qkv + start * stride + head * d_kv
    q = tl.load(base + queries[:, None] * stride + depth[None, :], mask=in_document & ~is_even, other=0.0)
    biases = table + head * (2 * reach + 2 * margin + 1) + reach + margin
    key_rows = base + heads * d_kv + key_start * stride
    relative = queries - key_start

    largest = tl.full((query_block,), -float("inf"), tl.float32)
    total = tl.zeros((query_block,), tl.float32)
    values = tl.zeros((query_block, d_kv), tl.float32)
    # Keys farther than ``reach`` from every query of the block share one bias before it and one behind it; only the
    # keys between need a bias by distance, and none of theirs is farther than ``reach`` + ``margin``.
    nearest = first_query - key_start
    far_before = tl.minimum(tl.maximum(nearest - reach + 1, 0) // key_block * key_block, keys)
    far_behind = tl.cdiv(tl.maximum(nearest + query_block - 1 + reach, 0), key_block) * key_block
    far_before = tl.where(is_even, keys, far_before)
    far_behind = tl.maximum(tl.minimum(far_behind, keys), far_before)
    before, behind = tl.load(biases - reach), tl.load(biases + reach)
    before = tl.where(is_even, 0.0, before)
    for first in tl.range(0, far_before, key_block):
        k, v, is_key = keys_and_values(key_rows, first, keys, heads * d_kv, stride, depth, key_block, is_even)
        largest, total, values = taken_in(tl.dot(q, k) * scale + before, v, is_key, largest, total, values)
    for first in tl.range(far_before, far_behind, key_block):
        k, v, is_key = keys_and_values(key_rows, first, keys, heads * d_kv, stride, depth, key_block, False)
        bias = tl.load(biases + ((first + tl.arange(0, key_block))[None, :] - relative[:, None]))
        largest, total, values = taken_in(tl.dot(q, k) * scale + bias, v, is_key, largest, total, values)
    for first in tl.range(far_behind, keys, key_block):
        k, v, is_key = keys_and_values(key_rows, first, keys, heads * d_kv, stride, depth, key_block, False)
        largest, total, values = taken_in(tl.dot(q, k) * scale + behind, v, is_key, largest, total, values)

    places_out = out + (start + queries)[:, None] * (heads * d_kv) + head * d_kv + depth[None, :]
    tl.store(places_out, (values / total[:, None]).to(out.dtype.element_ty), mask=in_document)


@triton.jit
def keys_and_values(
    key_rows: tl.tensor,
    first: tl.tensor,
    keys: tl.tensor,
    width: tl.constexpr,
    stride: tl.constexpr,
    depth: tl.tensor,
    key_block: tl.constexpr,
    is_even: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A block of keys [d_kv, key_block], its values [key_block, d_kv], and which of the key_block places have a key.

    Where attention ``is_even`` the keys are zeros.
    """
    places = first + tl.arange(0, key_block)
    is_key = places < keys
    here = key_rows + places * stride
    k = tl.load(here[None, :] + depth[:, None], mask=(is_key & (not is_even))[None, :], other=0.0)
    v = tl.load(here[:, None] + width + depth[None, :], mask=is_key[:, None], other=0.0)
    return k, v, is_key


@triton.jit
def taken_in(
    logits: tl.tensor,
    v: tl.tensor,
    is_key: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    values: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Updates the running softmax by a block of keys: largest logit, sum of weights, weighted sum of values.

    Logits are those of powers of two.
    """
    logits = tl.where(is_key[None, :], logits, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(logits, 1))
    weights = tl.exp2(logits - new_largest[:, None])
    fade = tl.exp2(largest - new_largest)
    values = tl.dot(weights.to(v.dtype), v, values * fade[:, None])
    return new_largest, total * fade + tl.sum(weights, 1), values


@triton.jit
def add_norm(
    residual: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    finite: tl.tensor,
    count: tl.tensor,
    row_scales: tl.tensor,
    column_scales: tl.tensor,
    out_scales: tl.tensor,
    epsilon: tl.tensor,
    inv_scale: tl.tensor,
    factor: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
    parts: tl.constexpr,
    has_weight: tl.constexpr,
    watches: tl.constexpr,
    has_scales: tl.constexpr,
    gives_bytes: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One row: the sum with the residual, in place, and its norm, which is rounded to a dtype or to bytes."""
    start_next(overlaps)
    wait_for_inputs(overlaps)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    here = residual + row * width + columns
    x = tl.load(here, mask=inside, other=0.0)
    if parts > 0:
        added = tl.zeros((block,), tl.float32)
        addend = delta + row * width + columns
        for _ in tl.static_range(parts):
            added += tl.load(addend, mask=inside, other=0.0).to(tl.float32)
            addend += tl.num_programs(0).to(tl.int64) * width
        if has_scales:
            added *= tl.load(row_scales + row) * tl.load(column_scales + columns, mask=inside, other=0.0)
        x += added * inv_scale
        tl.store(here, x, mask=inside)
    normed = x * tl.rsqrt(tl.sum(x * x) / width + epsilon)
    if has_weight:
        normed *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normed *= factor
    places = out + row * width + columns
    if gives_bytes:
        scale = scale_of(tl.max(tl.abs(normed)), faults_in(normed), out.dtype.element_ty)
        tl.store(places, in_bytes(normed, scale, out.dtype.element_ty), mask=inside)
        tl.store(out_scales + row, scale)
    else:
        rounded = normed.to(out.dtype.element_ty)
        tl.store(places, rounded, mask=inside)
        if watches:
            faults = faults_in(rounded.to(tl.float32))
            tl.store(finite, 0, mask=(faults > 0) & (row < tl.load(count)))


@triton.jit
def activated(x: tl.tensor, activation: tl.constexpr) -> tl.tensor:
    """The activation of values in float32; NaN stays NaN."""
    if activation == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    elif activation == "silu":
        y = x * tl.sigmoid(x)
    elif activation == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(activation == "gelu_new", "unknown activation")
        # (1 + tanh(z)) / 2 = sigmoid(2z)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return y


@triton.jit
def gate(
    joined: tl.tensor,
    out: tl.tensor,
    factor: tl.tensor,
    width: tl.constexpr,
    activation: tl.constexpr,
    is_gated: tl.constexpr,
    block: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """A run of one row: act(factor · gate) · up, or act alone."""
    start_next(overlaps)
    wait_for_inputs(overlaps)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    here = joined + row * (2 * width if is_gated else width) + columns
    result = activated(tl.load(here, mask=inside, other=0.0).to(tl.float32) * factor, activation)
    if is_gated:
        result *= tl.load(here + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), mask=inside)
