"""Packed weights: the same results, packed by the second call, and the originals let go."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY_CONFIGS, build_stack, needs_kernels, padding_mask, random_state
from torch._dynamo.utils import counters

from nai_t5_core.backends.choose import prepack, quantize_int8, why_not_int8, why_not_prepack
from nai_t5_core.backends.held import HeldLinear
from nai_t5_core.backends.onednn import OneDNNProduct
from nai_t5_core.bench.peers import own_t5
from nai_t5_core.generation.t5 import T5
from nai_t5_core.model.encoder import LAYOUTS, Layout

IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(3))
MASK = padding_mask([12, 5, 1], 12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@torch.no_grad()
def test_packed_equals_plain_in_every_call(kind: str, layout: Layout, dtype: torch.dtype, tolerance: float) -> None:
    state = random_state(TOY_CONFIGS[kind])
    plain, packed = (build_stack(TOY_CONFIGS[kind], state, dtype, layout) for _ in range(2))
    if why_not_prepack(packed) is not None:
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
    if why_not_prepack(stack) is not None:
        pytest.skip("this machine's torch has no oneDNN")
    originals = [weakref.ref(module.weight) for module in stack.modules() if isinstance(module, torch.nn.Linear)]
    linears = [weakref.ref(module) for module in stack.modules() if isinstance(module, torch.nn.Linear)]
    prepack(stack, "onednn")
    held = [module for module in stack.modules() if isinstance(module, HeldLinear)]
    packed = [form for module in held for form in module.forms]
    # The gate and up of each layer are products of their own.
    assert len(packed) == len(originals) + TOY_CONFIGS["v1.1"].num_layers
    assert not any(linear() for linear in linears)
    stack(IDS)
    assert all(not module.is_blocked for module in packed)
    stack(IDS)
    assert all(module.is_blocked for module in packed)
    assert not any(original() for original in originals)


@pytest.mark.skipif(
    torch.__version__ < "2.6", reason=f"the compiler of torch {torch.__version__} makes a graph for each object"
)
@torch.no_grad()
def test_one_graph_computes_the_products_of_many_modules() -> None:
    weights = [torch.randn(48, 32), torch.randn(48, 32)]
    x = torch.randn(5, 32)
    products = [OneDNNProduct(weight) for weight in weights]
    products.append(copy.deepcopy(products[0]))
    del products[0]
    torch._dynamo.reset()
    counters.clear()
    run = torch.compile(lambda product: product(x, "relu") * 2, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        for product, weight in zip(products, reversed(weights), strict=True):
            assert torch.allclose(run(product), F.relu(x @ weight.T) * 2, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_what_cannot_be_packed_is_refused() -> None:
    stack = build_stack(TOY_CONFIGS["v1.1"], random_state(TOY_CONFIGS["v1.1"]), torch.float64)
    with pytest.raises(ValueError, match=r"cannot prepack a model in torch.float64 on cpu"):
        prepack(stack)


# ---------------------------------------------------------------------------------------------------------------------
# What must not be done to packed weights
# ---------------------------------------------------------------------------------------------------------------------

PACKED: list[Any] = [
    pytest.param(lambda model: prepack(model, "onednn"), id="onednn"),
    pytest.param(lambda model: prepack(model, "kernels"), id="kernels", marks=needs_kernels),
    pytest.param(lambda model: quantize_int8(model, "onednn"), id="int8"),
    pytest.param(lambda model: quantize_int8(model, "kernels"), id="int8 kernels", marks=needs_kernels),
]
WHOLES: list[Any] = [
    pytest.param(lambda dtype, layout: build_stack(V1_1, random_state(V1_1), dtype, layout), id="encoder"),
    pytest.param(lambda dtype, layout: own_t5(V1_1, random_state(V1_1), dtype, layout), id="t5"),
]
V1_1 = TOY_CONFIGS["v1.1"]


def packed_or_skip(model: Any, change: Any) -> Any:
    if why_not_prepack(model) is not None or why_not_int8(model) is not None:
        pytest.skip("this machine packs or quantises no such weights")
    return change(model)


def encode(model: Any) -> torch.Tensor:
    out: torch.Tensor = (model.encoder_stack if isinstance(model, T5) else model)(IDS, MASK)
    return out


@pytest.mark.parametrize("change", PACKED)
@pytest.mark.parametrize("whole", WHOLES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("own", "other"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@torch.no_grad()
def test_packed_weights_are_not_moved_cast_or_replaced(
    whole: Any, layout: Layout, own: torch.dtype, other: torch.dtype, change: Any
) -> None:
    """Nothing is changed by what is refused; what would change nothing is allowed."""
    model = packed_or_skip(whole(own, layout), change)
    for calls in (0, 3):
        expected = [encode(model) for _ in range(calls)][-1:]
        before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        for attempt in (
            lambda: model.to(other),
            lambda: model.to("meta"),
            lambda: model.half(),
            lambda: model.encoder.block[1].to(other),
        ):
            with pytest.raises(ValueError, match=r"prepacked or quantised for the CPU, and cannot be moved or cast to"):
                attempt()
        with pytest.raises(ValueError, match=r"prepacked or quantised for the CPU, and takes no other weights"):
            model.load_state_dict(model.state_dict())
        after = dict([*model.named_parameters(), *model.named_buffers()])
        assert all(
            after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
        )
        assert all(torch.equal(encode(model), result) for result in expected)
    # To the dtype that it has: norms, which are in float32, are cast as in any other model.
    cast = encode(model.to("cpu").to(own)).float()
    assert float((cast - expected[0]).abs().max()) < 0.05 * float(expected[0].abs().max())
