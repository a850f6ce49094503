"""A quantised table that lies on another device than its ids: rows are moved, and not the table."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pretended_cuda import CUDA, PretendedCuda

from nai_t5_core.backends.quantised.forms import QuantisedForm
from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.backends.quantised.kinds import WEIGHT, QuantisedWeight
from nai_t5_core.backends.quantised.projections import QuantisedEmbedding

ROWS, COLUMNS = 50, 64
IDS = torch.tensor([[3, 49, 0], [51, 3, 7]])


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCuda]:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    with torch.no_grad(), PretendedCuda() as pretended:
        yield pretended


def table_of(dtype: torch.dtype) -> QuantisedEmbedding:
    """Q8_0, with two rows that were added."""
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (ROWS, COLUMNS // 32, 34), dtype=torch.uint8)
    blocks[..., :2] = torch.full((1,), 0.01).half().view(torch.uint8)
    weight = QuantisedWeight(GGML_KINDS["Q8_0"], (ROWS, COLUMNS), {WEIGHT: blocks.reshape(ROWS, -1)})
    table = QuantisedEmbedding(QuantisedForm(weight, scale=0.5), dtype)
    table.grow(torch.randn(2, COLUMNS))
    return table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_go_to_the_ids_of_another_device(dtype: torch.dtype, device: PretendedCuda) -> None:
    table = table_of(dtype)
    ids = IDS.to(CUDA)
    device.reset()
    rows = table(ids)
    assert (rows.device, rows.dtype, tuple(rows.shape)) == (CUDA, dtype, (*IDS.shape, COLUMNS))
    assert sum(device.moved) == ids.nbytes + rows.nbytes
    assert len(device.moved) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_the_whole_table(dtype: torch.dtype) -> None:
    table = table_of(dtype)
    assert torch.equal(table(IDS), table.plain()[IDS])
