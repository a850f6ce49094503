"""The relative position bias, against the reference's and against its own definition."""

from __future__ import annotations

import pytest
import torch

from nai_t5_core.model.attention import (
    DocumentAttention,
    distance_table,
    position_bias,
    relative_position_bucket,
    scattered_bias,
)
from nai_t5_core.model.packing import DocumentGroup

modeling_t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="transformers is the oracle")


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 20), (64, 256), (8, 16), (12, 100)])
def test_buckets_equal_the_reference(bidirectional: bool, buckets: int, max_distance: int) -> None:
    distance = torch.arange(-700, 701)
    ours = relative_position_bucket(distance, bidirectional, buckets, max_distance)
    reference = modeling_t5.T5Attention._relative_position_bucket(distance, bidirectional, buckets, max_distance)
    assert torch.equal(ours, reference)


@pytest.mark.parametrize("length", [1, 2, 17, 300])
def test_bias_of_a_document_is_the_table_at_each_distance(length: int) -> None:
    weight = torch.randn(32, 3)
    table = distance_table(weight, 128)
    position = torch.arange(length)
    distance = position[None, :] - position[:, None]
    expected = weight[relative_position_bucket(distance, True, 32, 128)].permute(2, 0, 1)
    assert torch.equal(position_bias(table, length), expected)
    assert torch.equal(scattered_bias(table, position, position), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "group",
    [
        DocumentGroup(0, count=4, queries=1, key_start=0, keys=1),
        DocumentGroup(0, count=2, queries=2, key_start=1, keys=1),
        DocumentGroup(
            0, count=1, queries=4, key_start=0, keys=1, key_rows=torch.tensor([2]), positions=torch.arange(4)
        ),
    ],
    ids=["single tokens", "one real token", "one real token, by its row"],
)
def test_a_single_key_has_all_the_weight(group: DocumentGroup, dtype: torch.dtype) -> None:
    """No kernel is called for it, and the result is the kernel's, to the bit."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 4, 2, 8, generator=generator).to(dtype)
    attended = DocumentAttention([group], 1.0).layer(torch.randn(2, 257, generator=generator).to(dtype))(q, k, v)
    keys = [group.key_start] if group.key_rows is None else group.key_rows.tolist()
    rows = [row // group.queries * group.queries + keys[0] for row in range(4)]
    lone = [
        torch.nn.functional.scaled_dot_product_attention(q[i, :, None], k[j, :, None], v[j, :, None])
        for i, j in enumerate(rows)
    ]
    assert torch.equal(attended, torch.stack(lone).squeeze(2))
