"""Packed weights: the same results, packed by the second call, and the originals let go."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from torch._dynamo.utils import counters

from nai_t5_core.encoder import LAYOUTS, Layout
from nai_t5_core.optimize import PackedLinear, can_prepack, prepack

IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(3))
MASK = padding_mask([12, 5, 1], 12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@torch.no_grad()
def test_packed_equals_plain_in_every_call(kind: str, layout: Layout, dtype: torch.dtype, tolerance: float) -> None:
    state = random_state(TOY_CONFIGS[kind])
    plain, packed = (build_stack(TOY_CONFIGS[kind], state, dtype, layout) for _ in range(2))
    if not can_prepack(packed):
        pytest.skip(f"this processor's oneDNN does not pack {dtype}")
    prepack(packed)
    expected = plain(IDS, MASK).float()
    for _ in range(3):
        difference = (packed(IDS, MASK).float() - expected).abs().max()
        assert float(difference / expected.abs().max()) <= tolerance
    assert not packed(IDS, torch.zeros_like(MASK), padding="skip").any()


@torch.no_grad()
def test_originals_are_kept_for_one_call_and_then_let_go() -> None:
    stack = build_stack(TOY_CONFIGS["v1.1"], random_state(TOY_CONFIGS["v1.1"]))
    if not can_prepack(stack):
        pytest.skip("this machine's torch has no oneDNN")
    originals = [weakref.ref(module.weight) for module in stack.modules() if isinstance(module, torch.nn.Linear)]
    linears = [weakref.ref(module) for module in stack.modules() if isinstance(module, torch.nn.Linear)]
    prepack(stack, "onednn")
    packed = [module for module in stack.modules() if isinstance(module, PackedLinear)]
    # The gate and up of each layer are products of their own.
    assert len(packed) == len(originals) + TOY_CONFIGS["v1.1"].num_layers
    assert not any(linear() for linear in linears)
    stack(IDS)
    assert all(module.packed is None for module in packed)
    stack(IDS)
    assert all(module.packed is not None and module.plain is None for module in packed)
    assert not any(original() for original in originals)


@torch.no_grad()
def test_one_graph_computes_the_products_of_many_modules() -> None:
    weights = [torch.randn(48, 32), torch.randn(48, 32)]
    x, addend = torch.randn(5, 32), torch.randn(5, 48)
    modules = [PackedLinear(weight, "relu") for weight in weights]
    modules.append(copy.deepcopy(modules[0]))
    del modules[0]
    torch._dynamo.reset()
    counters.clear()
    run = torch.compile(lambda module: module(x, None, addend) * 2, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        for module, weight in zip(modules, reversed(weights), strict=True):
            assert torch.allclose(run(module), F.relu(x @ weight.T + addend) * 2, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_what_cannot_be_packed_is_refused() -> None:
    stack = build_stack(TOY_CONFIGS["v1.1"], random_state(TOY_CONFIGS["v1.1"]), torch.float64)
    with pytest.raises(ValueError, match=r"cannot prepack a model in torch.float64 on cpu"):
        prepack(stack)
