"""What goes to C++ is checked: no tensor of another dtype, shape, device or order reaches it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, needs_kernels, padding_mask, random_state
from torch import Tensor

from nai_t5_core.backends.choose import prepack, quantize_int8, why_not_int8, why_not_prepack
from nai_t5_core.backends.kernels import calls
from nai_t5_core.backends.kernels.calls import add_product, attention, encode_block, normed_product, product
from nai_t5_core.backends.kernels.pieces import WeightPiece
from nai_t5_core.backends.kernels.weights import KernelWeight
from nai_t5_core.model.encoder import LAYOUTS, Layout

pytestmark = needs_kernels

TOKENS, WIDTH, HEADS, SIZE, HIDDEN = 4, 8, 2, 4, 12
IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(3))
MASK = padding_mask([12, 5, 1], 12)


def weight(columns: int, depth: int, is_gated: bool = False) -> KernelWeight:
    return KernelWeight.plain(torch.ones(columns, depth), torch.float32, is_gated)


# The right arguments of every function, by name.
ARGUMENTS: dict[Callable[..., Any], dict[str, Any]] = {
    normed_product: {
        "residual": torch.zeros(TOKENS, WIDTH),
        "norm": torch.ones(WIDTH),
        "epsilon": 1e-6,
        "weight": weight(6, WIDTH),
        "activation": "relu",
    },
    add_product: {
        "x": torch.zeros(TOKENS, WIDTH),
        "weight": weight(6, WIDTH),
        "residual": torch.zeros(TOKENS, 6),
    },
    product: {"x": torch.zeros(TOKENS, WIDTH), "weight": weight(6, WIDTH)},
    attention: {
        "projected": torch.zeros(TOKENS, 3 * HEADS * SIZE),
        "heads": HEADS,
        "documents": torch.tensor([(0, 3, 0, 3), (3, 1, 0, 1)]),
        "table": torch.zeros(HEADS, 257),
        "scale": 1.0,
    },
    encode_block: {
        "residual": torch.zeros(TOKENS, WIDTH),
        "weights": [
            weight(3 * HEADS * SIZE, WIDTH),
            weight(WIDTH, HEADS * SIZE),
            weight(2 * HIDDEN, WIDTH, True),
            weight(WIDTH, HIDDEN),
        ],
        "norms": (torch.ones(WIDTH), torch.ones(WIDTH)),
        "heads": HEADS,
        "epsilon": 1e-6,
        "activation": "relu",
        "documents": torch.tensor([(0, 3, 0, 3), (3, 1, 0, 1)]),
        "table": torch.zeros(HEADS, 257),
        "scale": 1.0,
    },
}


def in_another_dtype(tensor: Tensor) -> Tensor:
    others = {torch.float32: torch.float16, torch.int64: torch.int32, torch.int32: torch.int64}
    return tensor.to(others[tensor.dtype])


def too_short(tensor: Tensor) -> Tensor:
    return tensor[..., :-1].contiguous()


def with_gaps(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor], dim=-1)[..., ::2]


def in_another_order(tensor: Tensor) -> Tensor:
    return with_gaps(tensor) if tensor.ndim == 1 else tensor.t().contiguous().t()


def elsewhere(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


SPOILS = [in_another_dtype, too_short, with_gaps, in_another_order, elsewhere]


def spoiled(arguments: dict[str, Any], spoil: Callable[[Tensor], Tensor]) -> list[tuple[str, dict[str, Any]]]:
    """The arguments with one tensor spoiled, for each that there is, also those of weights."""
    found = []
    for name, value in arguments.items():
        parts = list(value) if isinstance(value, list | tuple) else [value]
        for place, part in enumerate(parts):
            for worse in _spoiled_parts(part, spoil):
                changed = [*parts[:place], worse, *parts[place + 1 :]]
                found.append((f"{name}[{place}]", {**arguments, name: changed if len(parts) > 1 else worse}))
    return found


def _with_piece(weight: KernelWeight, **changed: Tensor) -> KernelWeight:
    return replace(weight, pieces=(replace(weight.pieces[0], **changed),))


def _spoiled_parts(part: Any, spoil: Callable[[Tensor], Tensor]) -> list[Any]:
    if isinstance(part, Tensor):
        return [spoil(part)]
    if not isinstance(part, KernelWeight):
        return []
    packed, (piece,) = part.in_panels(), part.pieces
    assert packed.panels is not None
    worse, values = [replace(packed, panels=spoil(packed.panels))], spoil(piece.values)
    # Numbers are read as what their dtype says.
    if values.dtype == piece.values.dtype:
        worse.append(_with_piece(part, values=values))
    in_bytes = WeightPiece(
        torch.ones(part.columns, part.depth, dtype=torch.int8),
        part.columns,
        part.depth,
        scales=torch.ones(part.columns),
        factors=torch.ones(part.depth),
    )
    scaled = KernelWeight.of_pieces([in_bytes], torch.float32, torch.float32, part.is_gated)
    for name in ("scales", "factors"):
        worse.append(_with_piece(scaled, **{name: spoil(getattr(in_bytes, name))}))
    return worse


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("call", ARGUMENTS)
def test_every_tensor_is_checked(call: Callable[..., Any], spoil: Callable[[Tensor], Tensor]) -> None:
    right = ARGUMENTS[call]
    call(**right)
    wrong = spoiled(right, spoil)
    assert len(wrong) >= 3
    for name, arguments in wrong:
        with pytest.raises(ValueError, match=r"expected a contiguous .* on the CPU; got|odd|heads of an even size"):
            call(**arguments)
            pytest.fail(f"{name} went through")


DOCUMENTS = {
    "beyond the rows": [(0, 3, 0, 3), (3, 2, 0, 1)],
    "not all rows": [(0, 3, 0, 3)],
    "not in order": [(3, 1, 0, 1), (0, 3, 0, 3)],
    "over each other": [(0, 3, 0, 3), (2, 2, 0, 2)],
    "before the rows": [(-1, 4, 0, 4), (3, 1, 0, 1)],
    "no rows": [(0, 0, 0, 0), (0, 4, 0, 4)],
    "no key": [(0, 3, 0, 0), (3, 1, 0, 1)],
    "keys of the next": [(0, 3, 1, 3), (3, 1, 0, 1)],
    "keys before": [(0, 3, -1, 2), (3, 1, 0, 1)],
    "a number that overflows": [(0, 4, 2**63 - 1, 2)],
    "none": [],
}


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("call", [attention, encode_block])
def test_documents_are_checked(call: Callable[..., Any], documents: list[tuple[int, ...]]) -> None:
    arguments = {**ARGUMENTS[call], "documents": torch.tensor(documents, dtype=torch.int64).reshape(-1, 4)}
    if call is encode_block:
        arguments["residual"] = before = torch.randn(TOKENS, WIDTH)
        copy = before.clone()
    with pytest.raises(ValueError, match="documents must be one behind the other and take all rows"):
        call(**arguments)
    assert call is attention or torch.equal(before, copy)


def test_what_the_functions_forbid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"do not know the activation 'gelu'; they know None, relu, gelu_new, silu"):
        normed_product(**{**ARGUMENTS[normed_product], "activation": "gelu"})
    with pytest.raises(ValueError, match="weight without a gate; this one is gated"):
        add_product(**{**ARGUMENTS[add_product], "weight": weight(6, WIDTH, True)})
    with pytest.raises(ValueError, match="2 heads of an even size are expected; got 18 columns"):
        attention(**{**ARGUMENTS[attention], "projected": torch.zeros(TOKENS, 18)})
    with pytest.raises(ValueError, match="has 256 distances; their number is odd"):
        attention(**{**ARGUMENTS[attention], "table": torch.zeros(HEADS, 256)})
    weights = ARGUMENTS[encode_block]["weights"]
    gated = [replace(weights[0], is_gated=True), *weights[1:]]
    mixed = [KernelWeight.plain(torch.ones(3 * HEADS * SIZE, WIDTH), torch.bfloat16), *weights[1:]]
    for wrong in (gated, mixed):
        with pytest.raises(ValueError, match="the feed-forward's first alone may be gated, and all have one dtype"):
            encode_block(**{**ARGUMENTS[encode_block], "weights": wrong})
    with pytest.raises(ValueError, match="rounds=0; there must be at least one"):
        calls.multiply_in_registers(torch.float32, 0)
    with pytest.raises(ValueError, match=r"contiguous torch.float32 tensor \[4\] on the CPU; got torch.float32 \[3\]"):
        KernelWeight.plain(torch.zeros(4, 8, dtype=torch.int8), torch.float32, scales=torch.ones(3))
    with pytest.raises(ValueError, match=r"contiguous torch.float32 tensor \[4, 8\] on the CPU; got .* on meta"):
        KernelWeight.plain(torch.zeros(4, 8, device="meta"), torch.float32)


def without_dimensions(tensor: Tensor) -> Tensor:
    return tensor.flatten()[0].clone()


def with_one_more(tensor: Tensor) -> Tensor:
    return tensor[None]


@pytest.mark.parametrize("spoil", [without_dimensions, with_one_more])
@pytest.mark.parametrize("call", ARGUMENTS)
def test_the_number_of_dimensions_is_checked(call: Callable[..., Any], spoil: Callable[[Tensor], Tensor]) -> None:
    for name, arguments in spoiled(ARGUMENTS[call], spoil):
        with pytest.raises(ValueError, match=r"expected a (contiguous .*|tensor of 2 dimensions); got"):
            call(**arguments)
            pytest.fail(f"{name} went through")


@pytest.mark.parametrize("heads", [0, -2, 1.0, "2", None])
@pytest.mark.parametrize("call", [attention, encode_block])
def test_heads_are_checked(call: Callable[..., Any], heads: Any) -> None:
    with pytest.raises(ValueError, match=r"heads=.*; there must be a whole number of them, at least one"):
        call(**{**ARGUMENTS[call], "heads": heads})


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (4, 7), (8,), (1, 4, 8)])
def test_weights_of_no_or_odd_sizes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"contiguous weights of even sizes, not 0|expected a tensor of 2 dimensions"):
        KernelWeight.plain(torch.ones(shape), torch.float32)


def test_a_number_that_begins_between_two_is_refused() -> None:
    """As tensors in a file may lie; C++ takes all but weights to begin at multiples of their size."""
    within = torch.zeros(4 * TOKENS * WIDTH + 4, dtype=torch.uint8)
    tensor = torch.frombuffer(within.numpy(), dtype=torch.float32, count=TOKENS * WIDTH, offset=1)
    assert tensor.data_ptr() % 4
    weight = tensor.view(TOKENS, WIDTH).copy_(torch.randn(TOKENS, WIDTH))
    plain, aside = KernelWeight.plain(weight, torch.float32), KernelWeight.plain(weight.clone(), torch.float32)
    right = ARGUMENTS[normed_product]
    found = normed_product(**{**right, "weight": plain})
    assert torch.equal(found, normed_product(**{**right, "weight": aside}))
    assert torch.equal(plain.in_panels().original(), weight)
    with pytest.raises(ValueError, match=r"begins at an address that does not divide by 4; clone it"):
        normed_product(**{**ARGUMENTS[normed_product], "residual": tensor.view(TOKENS, WIDTH)})


def test_addresses_are_taken_in_one_place() -> None:
    folder = Path(calls.__file__).parent
    takers = [path.name for path in folder.glob("*.py") if re.search(r"data_ptr|ctypes\.data", path.read_text())]
    assert takers == ["addresses.py"]


@pytest.mark.parametrize("products", ["kernels", "onednn"])
@pytest.mark.parametrize("change", [prepack, quantize_int8])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_model_may_be_cast_before_it_is_packed(layout: Layout, change: Any, products: Any) -> None:
    """Which casts norms as well; they are read as what they are."""
    config = TOY_CONFIGS["v1.1"]
    stack = build_stack(config, random_state(config), torch.float32, layout).to(torch.bfloat16)
    assert {tensor.dtype for tensor in [*stack.parameters(), *stack.buffers()]} == {torch.bfloat16}
    if why_not_prepack(stack) is not None or why_not_int8(stack) is not None:
        pytest.skip("this machine packs or quantises no such weights")
    exact = build_stack(config, random_state(config), torch.float64, layout)(IDS, MASK)
    change(stack, products)
    for _ in range(3):
        difference = (stack(IDS, MASK) - exact)[MASK.bool()].abs().max() / exact.abs().max()
        assert float(difference) < (0.1 if change is quantize_int8 else 0.02)


@pytest.mark.parametrize("change", [prepack, quantize_int8])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_norms_cast_behind_the_models_back_are_read_right(layout: Layout, change: Any) -> None:
    """By a part of the model that nobody guards, as tools do that cast norms alone."""
    config = TOY_CONFIGS["v1.1"]
    state = {name: tensor.bfloat16().float() for name, tensor in random_state(config).items()}
    stack = build_stack(config, state, torch.float32, layout)
    if why_not_prepack(stack) is not None or why_not_int8(stack) is not None:
        pytest.skip("this machine packs or quantises no such weights")
    stack = change(stack, "kernels")
    expected = stack(IDS, MASK)
    for block in stack.encoder.block:
        for layer in block.layer:
            layer.layer_norm.to(torch.bfloat16)
    assert torch.allclose(stack(IDS, MASK), expected, atol=1e-5 if layout == "separate" else 0)
