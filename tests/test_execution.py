"""What the encoder executes: dtypes of its products, operations counted, and nothing that waits for a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nai_t5_core.facts.config import T5Config
from nai_t5_core.model.encoder import LAYOUTS, Layout, T5EncoderStack
from nai_t5_core.model.packing import PADDING_POLICIES, PaddingPolicy

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "scaled_dot_product")
HALF = (torch.float16, torch.bfloat16)


class RecordProducts(TorchDispatchMode):
    """Notes the dtypes of everything that goes into a matrix product or attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(product in name for product in PRODUCTS):
            tensors = [*args, *(kwargs or {}).values()]
            self.seen += [(name, item.dtype) for item in tensors if isinstance(item, torch.Tensor)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_no_product_of_a_half_precision_model_is_in_float32(kind: str, layout: Layout, dtype: torch.dtype) -> None:
    config = TOY_CONFIGS[kind].encoder_only()
    stack = build_stack(config, random_state(config), dtype, layout)
    mask = padding_mask([9, 4], 12)
    for policy in PADDING_POLICIES:
        with RecordProducts() as record:
            stack(torch.randint(3, 96, (2, 12)), mask, padding=policy)
        # Four projections at least, and attention, in each layer.
        assert len(record.seen) >= 5 * config.num_layers
        assert {item for item in record.seen if item[1] != dtype} == set()


@pytest.mark.parametrize("padding", PADDING_POLICIES)
@torch.no_grad()
def test_nothing_waits_for_the_device(kind: str, padding: PaddingPolicy) -> None:
    """On the meta device whatever needs a value raises, as on a GPU it would wait; the mask is on the CPU, as a
    tokenizer gives it."""
    config = TOY_CONFIGS[kind].encoder_only()
    stack = T5EncoderStack(config, device="meta", dtype=torch.float16, attention="sdpa").eval()
    ids = torch.empty(3, 12, dtype=torch.long, device="meta")
    out = stack(ids, padding_mask([12, 5, 0], 12), padding=padding)
    assert out.device.type == "meta"
    assert out.shape == (3, 12, config.d_model)
    assert stack(ids).shape == out.shape


def flops(stack: T5EncoderStack, ids: torch.Tensor, mask: torch.Tensor | None, padding: PaddingPolicy) -> int:
    with FlopCounterMode(display=False) as counter:
        stack(ids, mask, padding=padding)
    return counter.get_total_flops()


@torch.no_grad()
def test_operations_grow_with_real_tokens_and_not_with_padding() -> None:
    config = T5Config.model_validate({**TOY_CONFIGS["v1.1"].encoder_only().model_dump(), "num_layers": 2})
    stack = T5EncoderStack(config, device="meta", dtype=torch.bfloat16, attention="sdpa").eval()
    ids = torch.empty(1, 512, dtype=torch.long, device="meta")
    for real in (1, 32, 200):
        masked = flops(stack, ids, padding_mask([real], 512), "skip")
        alone = flops(stack, ids[:, :real], None, "attend")
        assert alone <= masked <= 1.1 * alone
    lengths = [5, 120, 32, 77, 64, 20, 11, 99]
    batch = flops(stack, ids.expand(8, -1), padding_mask(lengths, 512), "skip")
    alone = sum(flops(stack, ids[:, :real], None, "attend") for real in lengths)
    assert alone <= batch <= 1.1 * alone
