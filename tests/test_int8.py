"""8-bit products, by the kernels and by oneDNN: close to the exact ones, fully quantised, and refused where they cannot
be had."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, needs_kernels, padding_mask
from torch import nn

from nai_t5_core.backends.choices import ProductsChoice
from nai_t5_core.backends.choose import quantize_int8, why_not_int8
from nai_t5_core.backends.held import HeldLinear
from nai_t5_core.backends.int8_weight import Int8Product, Int8Weight
from nai_t5_core.backends.kernels.runners import KernelsOnPanels
from nai_t5_core.backends.products import INT8_ONEDNN
from nai_t5_core.bench.parity import measure_parity
from nai_t5_core.bench.parity_report import OWN
from nai_t5_core.bench.peers import own_t5, random_state
from nai_t5_core.generation.decoding import Decoding
from nai_t5_core.model.encoder import LAYOUTS, Layout
from nai_t5_core.prompts.text_encoder import TextEncoder

V1_1 = TOY_CONFIGS["v1.1"].encoder_only()
IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(3))
MASK = padding_mask([12, 5, 1], 12)

# Those of instruction sets are in test_backends.py.
PRODUCTS: list[Any] = [pytest.param("kernels", marks=needs_kernels), "onednn"]

pytestmark = pytest.mark.skipif(
    why_not_int8(build_stack(V1_1, random_state(V1_1), torch.float32)) is not None, reason="this processor has no VNNI"
)


@torch.no_grad()
def test_a_product_is_within_the_rounding_of_its_bytes() -> None:
    """Each of the two factors is off by at most half a step of 1/127 of its row's largest value."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 96, generator=generator)
    x = torch.randn(7, 96, generator=generator) * torch.tensor([1e-4, 1, 10, 1e4, 1, 1, 0])[:, None]
    out = Int8Product(Int8Weight.of(weight))(x)
    step_x = x.abs().amax(dim=1, keepdim=True) / 127
    step_w = weight.abs().amax(dim=1) / 127
    bound = 0.5 * step_x * weight.abs().sum(dim=1) + 0.5 * step_w * x.abs().sum(dim=1)[:, None]
    assert ((out - x @ weight.T).abs() <= bound + 0.25 * 96 * step_x * step_w + 1e-30).all()
    assert not out[-1].any()


@torch.no_grad()
def test_the_norm_weight_holds_down_large_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, norm = torch.randn(48, 96, generator=generator), torch.ones(96)
    x = torch.randn(7, 96, generator=generator)
    x[:, 5] *= 1000
    norm[5] = 1e-3
    norm[6] = 0
    folded = weight * norm
    expected = x @ folded.T
    plain, smooth = (Int8Product(Int8Weight.of(folded, scale))(x) for scale in (None, norm))
    assert float((smooth - expected).abs().max()) < 0.1 * float((plain - expected).abs().max())


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outliers", [False, True])
@torch.no_grad()
def test_every_kind_is_close(
    kind: str, layout: Layout, dtype: torch.dtype, outliers: bool, products: ProductsChoice
) -> None:
    config = TOY_CONFIGS[kind].encoder_only()
    state = random_state(config, outliers=outliers)
    expected = build_stack(config, state, torch.float64)(IDS, MASK)
    stack = quantize_int8(build_stack(config, state, dtype, layout), products)
    assert not any(isinstance(module, nn.Linear) for module in stack.modules())
    assert all(isinstance(block.runner, KernelsOnPanels) == (products == "kernels") for block in stack.encoder.block)
    out = stack(IDS, MASK)
    assert out.dtype == dtype
    errors = (out - expected)[MASK.bool()].abs()
    assert float(errors.median()) < 0.03
    assert float(errors.max()) < 0.3 * float(expected.abs().max())
    assert not stack(IDS, torch.zeros_like(MASK), padding="skip").any()


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_blocks_go_back_to_onednn_with_the_same_bytes(layout: Layout) -> None:
    stack = build_stack(V1_1, random_state(V1_1, outliers=True), torch.float32, layout)
    by_onednn = quantize_int8(copy.deepcopy(stack), "onednn")
    block: Any = quantize_int8(stack, "kernels").encoder.block[1]
    assert isinstance(block.runner, KernelsOnPanels)
    INT8_ONEDNN.bind(block, torch.float32)
    x = torch.randn(5, V1_1.d_ff, generator=torch.Generator().manual_seed(0))
    held = {name: module for name, module in block.named_modules() if isinstance(module, HeldLinear)}
    assert len(held) == (4 if layout == "fused" else 7)
    for name, module in held.items():
        part = x[:, : module.in_features]
        assert torch.equal(by_onednn.encoder.block[1].get_submodule(name)(part), module(part))


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_whole_t5_is_close(kind: str, layout: Layout) -> None:
    """Decoder, cross-attention and head as well; in steps as for a known text."""
    config = TOY_CONFIGS[kind]
    state = random_state(config)
    texts = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(4))
    expected = own_t5(config, state, torch.float64)(IDS, MASK, texts).logits
    model = quantize_int8(own_t5(config, state, torch.float32, layout))
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    errors = (model(IDS, MASK, texts).logits - expected).abs()
    assert float(errors.median()) < 0.05
    assert float(errors.max()) < 0.3 * float(expected.abs().max())
    cached = Decoding(model, model.read(IDS, MASK), model.new_cache(3, 1, 7))
    logits = torch.stack([cached.step(texts[:, place : place + 1])[:, 0] for place in range(7)], dim=1)
    assert float((logits - expected).abs().max()) < 0.3 * float(expected.abs().max())


def test_parity_prints_its_accuracy() -> None:
    pytest.importorskip("transformers", reason="the reference")
    report = measure_parity(V1_1, random_state(V1_1), ["bfloat16"], (), (20, 7), int8=True)
    medians = {item.name: item.quantiles["0.5"] for item in report.differences}
    assert medians[f"{OWN} fused"] < medians[f"{OWN} int8"] < 10 * medians[f"{OWN} fused"]
    assert report.passed


def test_text_encoder_takes_it_by_name() -> None:
    encoder = TextEncoder.from_pretrained(quantize="int8")
    held = [module for module in encoder.stack.modules() if isinstance(module, HeldLinear)]
    assert held and all(isinstance(module.original(), Int8Weight) for module in held)
    exact = TextEncoder.from_pretrained(dtype="float32").encode(["a cat"]).hidden_states
    out = encoder.encode(["a cat"]).hidden_states.float()
    assert float((out - exact).abs().max()) < 0.3 * float(exact.abs().max())
    for told, message in (
        ({"quantize": "int4"}, r"quantize='int4'; allowed: None, 'int8'"),
        ({"quantize": "int8", "dtype": "float16"}, r"float16 on cpu to int8: .* for float32 and bfloat16 on the CPU"),
        ({"quantize": "int8", "device": "meta"}, r"on meta to int8: .* 8 bits are for float32 and bfloat16 on the CPU"),
    ):
        with pytest.raises(ValueError, match=message):  # before anything is looked for
            TextEncoder.from_pretrained("no such file", **{"device": "cpu", **told})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantize and compile exclude each other"):
        TextEncoder.from_pretrained(quantize="int8", compile=True)


def test_what_cannot_be_quantised_is_refused() -> None:
    stack = build_stack(V1_1, random_state(V1_1), torch.float16)
    with pytest.raises(ValueError, match=r"cannot quantise a model in torch.float16 on cpu to int8"):
        quantize_int8(stack)
    stack = build_stack(V1_1, random_state(V1_1), torch.float32)
    with pytest.raises(
        ValueError, match=r"unknown products 'mine'; allowed: auto, kernels, amx, avx512, avx2-vnni, avx2, onednn"
    ):
        quantize_int8(stack, "mine")  # type: ignore[arg-type]
    assert any(isinstance(module, nn.Linear) for module in stack.modules())
