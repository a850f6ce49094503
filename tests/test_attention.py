"""The relative position bias, against the reference's and against its own definition."""

from __future__ import annotations

import pytest
import torch

from nai_t5_core.attention import distance_table, position_bias, relative_position_bucket, scattered_bias

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
