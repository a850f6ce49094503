"""Packing: which positions are computed, how they are grouped, and the way back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import padding_mask
from hypothesis import given
from hypothesis import strategies as st

from nai_t5_core.model.packing import PADDING_POLICIES, pack_batch

masks = st.integers(1, 7).flatmap(
    lambda length: st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=5)
)


@given(rows=masks, extra_pad=st.integers(0, 2))
def test_skip_computes_real_tokens_and_the_extra_pad_only(rows: list[list[bool]], extra_pad: int) -> None:
    mask = torch.tensor(rows)
    batch, length = mask.shape
    packing = pack_batch(mask, batch, length, "skip", extra_pad)
    computed = packing.unpack(torch.ones(packing.tokens, 1)).squeeze(-1).bool()
    for row, done in zip(mask, computed, strict=True):
        expected = row.clone()
        if row.any():
            end = int(row.nonzero()[-1]) + 1
            expected[end : end + extra_pad] = True
        assert torch.equal(done, expected)


@given(rows=masks)
def test_unpack_puts_every_row_back(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    batch, length = mask.shape
    values = torch.arange(1.0, batch * length + 1).reshape(batch, length, 1)
    for padding in PADDING_POLICIES:
        packing = pack_batch(mask, batch, length, padding)
        back = packing.unpack(packing.pack(values))
        kept = mask if padding in ("skip", "trim") else torch.ones_like(mask)
        assert torch.equal(back, (values * kept[..., None])[:, : packing.output_length])


@given(rows=masks, dtype=st.sampled_from([torch.int32, torch.int64, torch.float32]))
def test_what_goes_to_a_device_arrives_there(rows: list[list[bool]], dtype: torch.dtype) -> None:
    """In one copy, of which each tensor is a part; with a number the CPU counts as another device."""
    mask, device = torch.tensor(rows), torch.device("cpu", 0)
    values = torch.arange(1, mask.numel() + 1, dtype=dtype).reshape(mask.shape)
    for padding in PADDING_POLICIES:
        packing = pack_batch(mask, *mask.shape, padding)
        row, there = packing.pack_onto(device, values)
        assert torch.equal(row.to(dtype), packing.pack(values))
        assert (there.index is None) == (packing.index is None) and len(there.groups) == len(packing.groups)
        assert there.index is None or torch.equal(there.index, packing.index)
        for group, original in zip(there.groups, packing.groups, strict=True):
            if original.key_rows is not None:
                assert torch.equal(group.key_rows, original.key_rows)
                assert torch.equal(group.positions, original.positions)
            assert replace(group, key_rows=None, positions=None) == replace(original, key_rows=None, positions=None)


@given(rows=masks)
def test_groups_cover_the_row_without_gap(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    for padding in PADDING_POLICIES:
        packing = pack_batch(mask, *mask.shape, padding)
        starts = [group.start for group in packing.groups]
        assert starts == [0, *[group.stop for group in packing.groups]][: len(starts)]


def test_equal_lengths_become_one_group() -> None:
    mask = padding_mask([3, 5, 3, 3, 5], 8).bool()
    packing = pack_batch(mask, 5, 8, "skip")
    assert [(group.count, group.queries) for group in packing.groups] == [(3, 3), (2, 5)]


def test_exact_attends_to_real_keys_only() -> None:
    mask = padding_mask([3, 8], 8).bool()
    packing = pack_batch(mask, 2, 8, "exact")
    assert [(group.queries, group.keys) for group in packing.groups] == [(8, 3), (8, 8)]


def test_trim_cuts_to_the_longest_prompt() -> None:
    assert pack_batch(padding_mask([2, 5], 8).bool(), 2, 8, "trim").output_length == 5
    assert pack_batch(torch.zeros(2, 8, dtype=torch.bool), 2, 8, "trim").output_length == 0


def test_bad_arguments_are_named() -> None:
    mask = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"'none'.*attend, exact, skip, trim"):
        pack_batch(mask, 2, 4, "none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="extra_pad=-1"):
        pack_batch(mask, 2, 4, "skip", -1)
    with pytest.raises(ValueError, match=r"shape \[2, 4\].*\[2, 5\]"):
        pack_batch(mask, 2, 5)
