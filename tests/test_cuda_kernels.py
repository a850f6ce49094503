"""The kernels for CUDA: in Triton's interpreter against float64, compiled for GPUs that are not here, and on one."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nai_t5_core.attention import DocumentAttention
from nai_t5_core.config import Activation, T5Config
from nai_t5_core.cuda.documents import document_table
from nai_t5_core.cuda.encoder import PRODUCTS_CHOICES, cuda_encoder
from nai_t5_core.cuda.refusals import missing_triton, refuses
from nai_t5_core.encoder import T5EncoderStack
from nai_t5_core.fuse import cook, fused_recipes
from nai_t5_core.guard import rescale
from nai_t5_core.layers import ACTIVATIONS, NoInit
from nai_t5_core.packing import PADDING_POLICIES, DocumentGroup, PaddingPolicy
from nai_t5_core.scales import LayerScales, StackScales

if missing := missing_triton():
    pytest.skip(missing, allow_module_level=True)

from nai_t5_core.cuda.launches import Documents, Watch, add_norm, attend, gate
from nai_t5_core.cuda.products import CONFIGURATIONS, Configuration, TritonProducts, product
from nai_t5_core.cuda.torch_products import sums_in_float32

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU here")

# One rounding, relative to all numbers together; the interpreter cuts bfloat16 off where a GPU rounds.
ONE_ROUNDING = {torch.float16: 3e-4, torch.bfloat16: 2.4e-3 if HAS_GPU else 4.8e-3}
DTYPES = tuple(ONE_ROUNDING)
# The interpreter multiplies the bits of bfloat16 as if they were numbers.
PRODUCT_DTYPES = DTYPES if HAS_GPU else (torch.float16,)
WIDTHS = (16, 100, 768, 2560)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def error(found: Tensor, exact: Tensor) -> float:
    """Of all numbers together, relative to them; for zeros only zeros are right."""
    difference = float((found.cpu().double() - exact.cpu()).norm())
    return difference and difference / float(exact.double().norm())


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("parts", [None, 1, 3])
@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_in_float32_and_its_norm_is_rounded_once(
    width: int, parts: int | None, has_weight: bool, dtype: torch.dtype
) -> None:
    for rows in (1, 5):
        residual = draw(rows, width) * 7
        delta = None if parts is None else draw(parts, rows, width, seed=1, dtype=dtype)
        exact = residual.double() + (0 if delta is None else 0.25 * delta.double().sum(0))
        weight = draw(width, seed=2).abs() + 0.5 if has_weight else None
        given = delta[0] if delta is not None and parts == 1 else delta
        out = add_norm(residual, given, 0.25, 1e-6, dtype, weight)
        assert out.dtype == dtype
        assert error(residual, exact) < 1e-6
        normed = F.rms_norm(exact, (width,), None if weight is None else weight.double(), 1e-6)
        assert error(out, normed) < ONE_ROUNDING[dtype]


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_noted_among_those_that_count(fault: float) -> None:
    for faulty, expected in ((1, 0), (2, 0), (3, 1)):
        residual = draw(5, 100)
        residual[faulty, 7] = fault
        finite = torch.ones(1, dtype=torch.int32, device=DEVICE)
        watch = Watch(finite, torch.tensor([3], dtype=torch.int32, device=DEVICE))
        add_norm(residual, None, 1.0, 1e-6, torch.float16, watch=watch)
        assert int(finite) == expected


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gating_is_rounded_once(activation: Activation, is_gated: bool, dtype: torch.dtype) -> None:
    for rows, width in ((1, 16), (3, 1100)):
        joined = draw(rows, width * (2 if is_gated else 1), dtype=dtype) * 3
        exact = joined.double()
        gates, up = exact.chunk(2, -1) if is_gated else (exact, 1)
        found = gate(joined, activation, is_gated)
        assert found.dtype == dtype
        assert error(found, ACTIVATIONS[activation](gates) * up) < ONE_ROUNDING[dtype]


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_hide_nothing(activation: Activation) -> None:
    values = torch.tensor([[float("nan"), float("inf"), 60000.0, -60000.0]], dtype=torch.float16, device=DEVICE)
    found, expected = gate(values, activation, False)[0], ACTIVATIONS[activation](values.float()).half()[0]
    assert found.isfinite().tolist() == [False, False, True, True]
    assert torch.equal(found[2:], expected[2:])


GROUPS = [
    [DocumentGroup(0, 1, 1, 0, 1)],
    [DocumentGroup(0, 3, 5, 0, 5), DocumentGroup(15, 1, 70, 0, 70)],
    [DocumentGroup(0, 2, 33, 0, 7), DocumentGroup(66, 1, 33, 30, 3), DocumentGroup(99, 1, 33, 5, 1)],
    [DocumentGroup(0, 2, 21, 0, 0), DocumentGroup(42, 1, 130, 3, 127)],
]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("heads", "d_kv"), [(1, 64), (3, 16), (2, 128)])
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_documents_attend_to_their_own_keys(
    groups: list[DocumentGroup], heads: int, d_kv: int, block: int, dtype: torch.dtype
) -> None:
    tokens, scale = groups[-1].stop, d_kv**-0.5
    qkv = draw(tokens, 3 * heads * d_kv, dtype=dtype)
    table = draw(heads, 65, seed=1, dtype=dtype if block == 16 else torch.float32)
    q, k, v = qkv.double().unflatten(-1, (3, heads, d_kv)).unbind(1)
    exact = DocumentAttention(groups, scale).layer(table.double())(q, k, v).flatten(-2)
    found = attend(qkv, table, Documents(document_table(groups, block).to(DEVICE), block), scale)
    assert found.dtype == dtype
    assert error(found, exact) < 2 * ONE_ROUNDING[dtype]


def test_attention_without_keys_sees_no_logits() -> None:
    qkv = draw(5, 3 * 16, dtype=torch.float16)
    qkv[:, :32] = float("inf")
    found = attend(qkv, draw(1, 9), Documents(document_table([DocumentGroup(0, 1, 5, 0, 0)], 16).to(DEVICE), 16), 1.0)
    torch.testing.assert_close(found, qkv[:, 32:].float().mean(0).half().expand(5, 16), atol=1e-3, rtol=1e-3)


def test_surplus_blocks_of_a_table_write_nothing() -> None:
    qkv, bias = draw(20, 3 * 16, dtype=torch.float16), draw(1, 9)
    table = document_table([DocumentGroup(0, 1, 20, 0, 20)], 16)
    padded = F.pad(table, (0, 0, 0, 3)).to(DEVICE)
    expected = attend(qkv, bias, Documents(table.to(DEVICE), 16), 1.0)
    assert torch.equal(attend(qkv, bias, Documents(padded, 16), 1.0), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 16, 37, 128])
@pytest.mark.parametrize(
    "configuration", [Configuration(16, 16, 1, 2), Configuration(64, 32, 3), Configuration(32, 64, 2)]
)
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_products_in_parts_are_summed_in_float32(rows: int, configuration: Configuration, dtype: torch.dtype) -> None:
    x, weight = draw(rows, 384, dtype=dtype), draw(128, 384, seed=1, dtype=dtype)
    found = product(x, weight, configuration, torch.float32)
    assert found.shape == (configuration.parts, rows, 128)
    assert error(found.sum(0), x.double() @ weight.double().T) < 1e-6


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_activated_products_are_rounded_once(
    rows: int, activation: Activation, is_gated: bool, dtype: torch.dtype
) -> None:
    x, weight = draw(rows, 128, dtype=dtype), draw(192, 128, seed=1, dtype=dtype) * 0.1
    exact = x.double() @ weight.double().T
    gates, up = exact.chunk(2, -1) if is_gated else (exact, 1)
    found = TritonProducts().activated(x, weight, activation, is_gated)
    assert found.dtype == dtype
    assert error(found, ACTIVATIONS[activation](gates) * up) < ONE_ROUNDING[dtype]


@pytest.mark.parametrize("sizes", [(768, 768), (1536, 512), (512, 384), (1024, 2816), (80, 64), (64, 80), (40, 24)])
def test_products_of_every_size_are_right(sizes: tuple[int, int]) -> None:
    columns, depth = sizes
    weight = draw(columns, depth, seed=1, dtype=torch.float16)
    for rows in (2, 130) if depth < 100 else (2,):
        x = draw(rows, depth, dtype=torch.float16)
        exact = x.double() @ weight.double().T
        summed = TritonProducts().summed(x, weight)
        assert error(summed.double().sum(0) if summed.ndim == 3 else summed, exact) < ONE_ROUNDING[torch.float16]
        assert error(TritonProducts().plain(x, weight), exact) < ONE_ROUNDING[torch.float16]


def test_products_that_do_not_fit_are_refused() -> None:
    x, weight = draw(129, 64, dtype=torch.float16), draw(128, 64, dtype=torch.float16)
    for rows, configuration, activation in (
        (129, Configuration(16, 16), None),
        (5, Configuration(256, 16), None),
        (5, Configuration(16, 128), None),
        (5, Configuration(16, 16, 2), "relu"),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            product(x[:rows], weight, configuration, torch.float16, activation)  # type: ignore[arg-type]


def test_every_kind_of_product_has_a_configuration_of_every_size() -> None:
    assert set(CONFIGURATIONS) == {(kind, rows) for kind in ("plain", "gated", "summed") for rows in (16, 32, 64, 128)}


# ---------------------------------------------------------------------------------------------------------------------
# Encoders
# ---------------------------------------------------------------------------------------------------------------------

KINDS = ("v1.0", "v1.1", "umt5", "ul2")
CAN_OVERLAP = HAS_GPU and torch.cuda.get_device_capability() >= (9, 0)
# The products that can be computed here.
HERE = [choice for choice in PRODUCTS_CHOICES if CAN_OVERLAP or choice != "triton-overlapping"]
# Left-padded, without a real token, full, and padded as usual.
MASK = padding_mask([0, 0, 11, 4], 11)
MASK[0, 7:] = 1
IDS = torch.randint(0, 96, MASK.shape, generator=torch.Generator().manual_seed(5))
SCALES = StackScales((LayerScales(1, 0.5, 0.25), LayerScales(0.5, 0.25, 1), LayerScales(0.125, 0.5, 0.5)), 0.5)


def stack_of(
    config: T5Config, dtype: torch.dtype = torch.float16, scales: StackScales | None = None, device: str = DEVICE
) -> T5EncoderStack:
    config = config.encoder_only()
    state = random_state(config)
    if scales is None:
        return build_stack(config, state, dtype).to(device)
    stack = T5EncoderStack(config, "fused", NoInit, scales, device="meta", dtype=dtype)
    recipes = fused_recipes(config, scales)
    stack.load_state_dict({recipe.target: cook(recipe, state.__getitem__, dtype) for recipe in recipes}, assign=True)
    return stack.to(device)


def exact_of(config: T5Config) -> T5EncoderStack:
    return stack_of(config, torch.float64, device="cpu")


def assert_as_exact(found: Tensor, stack: T5EncoderStack, exact: T5EncoderStack, **batch: Any) -> None:
    """As near to float64 as the stack itself on the CPU."""
    expected = exact(**batch)
    assert found.shape == expected.shape
    assert found.dtype == stack.dtype
    assert error(found, expected) < 1.3 * error(copy.deepcopy(stack).cpu()(**batch), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", PADDING_POLICIES)
def test_the_encoder_is_as_exact_as_the_stack(kind: str, padding: PaddingPolicy) -> None:
    stack, exact = stack_of(TOY_CONFIGS[kind]), exact_of(TOY_CONFIGS[kind])
    found = cuda_encoder(stack, eager=True).encode(IDS, MASK, padding)
    assert_as_exact(found.hidden, stack, exact, input_ids=IDS, attention_mask=MASK, padding=padding)
    assert int(found.finite) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("products", HERE)
def test_scaled_encoders_and_extra_pads(kind: str, products: Any) -> None:
    stack, exact = stack_of(TOY_CONFIGS[kind], scales=SCALES), exact_of(TOY_CONFIGS[kind])
    found = cuda_encoder(stack, eager=True, products=products)(IDS, MASK, "trim", 2)
    assert_as_exact(found, stack, exact, input_ids=IDS, attention_mask=MASK, padding="trim", extra_pad=2)


def test_no_mask_and_a_long_prompt() -> None:
    stack, exact = stack_of(TOY_CONFIGS["v1.1"]), exact_of(TOY_CONFIGS["v1.1"])
    ids = torch.randint(0, 96, (1, 140), generator=torch.Generator().manual_seed(1))
    assert_as_exact(cuda_encoder(stack, eager=True)(ids), stack, exact, input_ids=ids)


def test_what_the_table_cannot_say_is_left_to_the_stack() -> None:
    stack = stack_of(TOY_CONFIGS["v1.1"])
    encoder = cuda_encoder(stack, eager=True)
    holes = MASK.clone()
    holes[2, 3] = 0
    for mask in (holes, MASK[:, None] * MASK[:, :, None]):
        found = encoder.encode(IDS, mask)
        assert torch.equal(found.hidden, stack(IDS, mask))
        assert int(found.finite) == 1


@pytest.mark.parametrize("padding", PADDING_POLICIES)
def test_batches_without_a_token(padding: PaddingPolicy) -> None:
    stack = stack_of(TOY_CONFIGS["v1.1"])
    encoder = cuda_encoder(stack, eager=True)
    for ids, mask in ((IDS[:0], None), (IDS[:, :0], None), (IDS[:0], MASK[:0])):
        assert torch.equal(encoder(ids, mask, padding), stack(ids, mask, padding=padding))
    if padding in ("skip", "trim"):
        nothing = torch.zeros_like(MASK)
        assert torch.equal(encoder(IDS, nothing, padding), stack(IDS, nothing, padding=padding))


def test_inputs_that_the_stack_refuses_are_refused() -> None:
    encoder = cuda_encoder(stack_of(TOY_CONFIGS["v1.1"]), eager=True)
    for ids, mask, options, message in (
        (IDS[0], None, {}, "batch, length"),
        (IDS + 96, None, {}, "outside the vocabulary"),
        (IDS, MASK[:, 1:], {}, "must be equal"),
        (IDS, MASK, {"padding": "none"}, "unknown padding policy"),
        (IDS, MASK, {"padding": "trim", "extra_pad": -1}, "extra_pad"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder(ids, mask, **options)


def changed_in_place(stack: Any) -> None:
    stack.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(-1)
    stack.encoder.block[1].layer[1].DenseReluDense.wo.weight.mul_(2)
    stack.encoder.final_layer_norm.weight.mul_(3)


def replaced(stack: Any) -> None:
    attends = stack.encoder.block[0].layer[0].SelfAttention
    attends.relative_attention_bias.weight = nn.Parameter(attends.relative_attention_bias.weight.flip(0).contiguous())
    attends.qkv.weight = nn.Parameter(attends.qkv.weight.flip(0).contiguous())
    stack.shared.weight = nn.Parameter(stack.shared.weight.flip(0).contiguous())


def rescaled(stack: Any) -> None:
    rescale(stack, 1, LayerScales(0.25, 0.5, 0.5))
    changed_in_place(stack)


CHANGES = (changed_in_place, replaced, rescaled)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(change: Any) -> None:
    stack, exact = stack_of(TOY_CONFIGS["umt5"]), exact_of(TOY_CONFIGS["umt5"])
    encoder = cuda_encoder(stack, eager=True)
    before = encoder(IDS, MASK)
    for one in (stack, exact):
        change(one)
    found = encoder(IDS, MASK)
    assert error(found, before.double()) > 0.1
    assert_as_exact(found, stack, exact, input_ids=IDS, attention_mask=MASK)


def test_inference_tensors_do_not_count_their_changes() -> None:
    with torch.inference_mode():
        stack = stack_of(TOY_CONFIGS["v1.1"])
        encoder = cuda_encoder(stack, eager=True)
        encoder(IDS, MASK)
        changed_in_place(stack)
        assert_as_exact(
            encoder(IDS, MASK), stack, copy.deepcopy(stack).cpu().double(), input_ids=IDS, attention_mask=MASK
        )


@pytest.mark.parametrize("padding", PADDING_POLICIES)
def test_a_result_that_is_not_finite_is_noted(padding: PaddingPolicy) -> None:
    stack = stack_of(TOY_CONFIGS["v1.1"])
    stack.shared.weight[7] = float("inf")
    encoder = cuda_encoder(stack, eager=True)
    for ids, expected in ((IDS.clamp(min=8), 1), (IDS.clamp(max=7), 0)):
        found = encoder.encode(ids, MASK, padding)
        assert int(found.finite) == expected == int(found.hidden.isfinite().all())


def with_hook(stack: Any) -> None:
    stack.encoder.block[1].layer[1].DenseReluDense.register_forward_hook(lambda *_: None)


def with_subclass(stack: Any) -> None:
    class Linear(nn.Linear):
        pass

    stack.encoder.block[2].layer[0].SelfAttention.o = Linear(64, 64, bias=False).half()


def with_other_dtype(stack: Any) -> None:
    stack.encoder.block[2].layer[0].SelfAttention.o.float()


def with_transposed_weight(stack: Any) -> None:
    linear = stack.encoder.block[0].layer[0].SelfAttention.o
    linear.weight = nn.Parameter(linear.weight.t())


TAMPERED = {with_hook: "hooks", with_subclass: "computes on its own", with_other_dtype: "float32"}
TAMPERED[with_transposed_weight] = "contiguous"


@pytest.mark.parametrize("tamper", TAMPERED)
def test_tampered_models_are_refused_before_and_after(tamper: Any) -> None:
    stack = stack_of(TOY_CONFIGS["v1.1"])
    encoder = cuda_encoder(stack, eager=True)
    tamper(stack)
    assert TAMPERED[tamper] in str(refuses(stack))
    with pytest.raises(ValueError, match=TAMPERED[tamper]):
        encoder(IDS)
    with pytest.raises(ValueError, match=TAMPERED[tamper]):
        cuda_encoder(stack, eager=True)


def test_what_cannot_run_is_refused() -> None:
    config = TOY_CONFIGS["v1.1"]
    assert refuses(stack_of(config)) is None
    assert "float32" in str(refuses(stack_of(config, torch.float32)))
    assert "separate" in str(refuses(build_stack(config, random_state(config), torch.float16, "separate")))
    for d_kv in (8, 48):
        assert f"heads of size {d_kv}" in str(refuses(stack_of(config.model_copy(update={"d_kv": d_kv}))))
    assert "on meta" in str(refuses(T5EncoderStack(config, device="meta", dtype=torch.float16)))
    with torch.enable_grad():
        assert "gradients" in str(refuses(stack_of(config)))
        with pytest.raises(ValueError, match="gradients"):
            cuda_encoder(stack_of(config), eager=True)(IDS)
    with FlopCounterMode(display=False):
        assert "mode" in str(refuses(stack_of(config)))
    if not CAN_OVERLAP:
        with pytest.raises(ValueError, match=r"capability 9\.0"):
            cuda_encoder(stack_of(config), eager=True, products="triton-overlapping")
    with pytest.raises(ValueError, match="unknown products"):
        cuda_encoder(stack_of(config), products="own")  # type: ignore[arg-type]
    if not HAS_GPU:
        with pytest.raises(ValueError, match="eager=True"):
            cuda_encoder(stack_of(config))


def test_settings_of_the_process_are_left_as_they_were() -> None:
    settings = torch.backends.cuda.matmul
    name = "allow_fp16_reduced_precision_reduction"
    has_parts = hasattr(settings, f"{name}_split_k")
    before = (getattr(settings, name), True) if has_parts else getattr(settings, name)
    try:
        for setting in (True, False, *([(False, False)] if has_parts else [])):
            setattr(settings, name, setting)
            states = [(getattr(settings, name), has_parts and getattr(settings, f"{name}_split_k"))]
            with pytest.raises(KeyError), sums_in_float32():
                assert getattr(settings, name) is False
                raise KeyError
            states.append((getattr(settings, name), has_parts and getattr(settings, f"{name}_split_k")))
            assert states[0] == states[1]
    finally:
        setattr(settings, name, before)


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs
# ---------------------------------------------------------------------------------------------------------------------


def batches() -> Iterator[dict[str, Any]]:
    """Of many shapes: tokens in several buckets and beyond, documents beyond the room of a bucket, ids on a device."""
    generator = torch.Generator().manual_seed(3)
    yield {"input_ids": torch.randint(0, 96, (1, 1100), generator=generator)}
    for batch, length in ((1, 1), (1, 16), (1, 17), (3, 40), (20, 6), (1, 300), (2, 1), (7, 77), (1, 9)):
        ids = torch.randint(0, 96, (batch, length), generator=generator)
        ends = torch.randint(0, length + 1, (batch, 1), generator=generator)
        mask = (torch.arange(length)[None] < ends).long()
        yield {"input_ids": ids}
        yield {"input_ids": ids.to(DEVICE), "attention_mask": mask.flip(1)}
        for padding in PADDING_POLICIES:
            yield {"input_ids": ids, "attention_mask": mask, "padding": padding, "extra_pad": batch % 3}


@lru_cache
def expectations(kind: str, dtype: torch.dtype) -> list[tuple[Tensor, float]]:
    """What is exact for every batch, and how far from that a result may be, by the error of the stack on the CPU."""
    exact, on_cpu = exact_of(TOY_CONFIGS[kind]), stack_of(TOY_CONFIGS[kind], dtype, device="cpu")
    found = []
    for batch in batches():
        batch["input_ids"] = batch["input_ids"].cpu()
        expected = exact(**batch)
        found.append((expected, 1.3 * error(on_cpu(**batch), expected) + ONE_ROUNDING[dtype]))
    return found


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("products", HERE)
def test_graphs_equal_the_stack_for_batches_of_many_shapes(kind: str, dtype: torch.dtype, products: Any) -> None:
    stack = stack_of(TOY_CONFIGS[kind], dtype)
    encoder, eager = cuda_encoder(stack, products=products), cuda_encoder(stack, eager=True, products=products)
    found = [encoder.encode(**batch) for batch in batches()]
    again = [encoder(**batch) for batch in batches()]
    assert encoder.graphs is not None
    assert len(encoder.graphs.sizes) >= 6
    for batch, first, second, (expected, limit) in zip(batches(), found, again, expectations(kind, dtype), strict=True):
        assert torch.equal(first.hidden, second)
        assert int(first.finite) == 1
        for hidden in (first.hidden, eager(**batch)):
            assert hidden.shape == expected.shape
            assert error(hidden, expected) < limit


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("under", [torch.no_grad, torch.inference_mode])
def test_graphs_see_changed_weights(change: Any, under: Any) -> None:
    with under():
        stack, exact = stack_of(TOY_CONFIGS["umt5"]), exact_of(TOY_CONFIGS["umt5"])
        encoder = cuda_encoder(stack)
        before = encoder(IDS, MASK)
        for one in (stack, exact):
            change(one)
        found = encoder(IDS, MASK)
        assert error(found, before.double()) > 0.1
        assert_as_exact(found, stack, exact, input_ids=IDS, attention_mask=MASK)


@pytest.mark.cuda
@needs_gpu
def test_graphs_recorded_in_inference_mode_run_outside_of_it_and_the_other_way_round() -> None:
    stack = stack_of(TOY_CONFIGS["v1.1"])
    for first, second in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        encoder = cuda_encoder(stack)
        with first():
            expected = encoder(IDS, MASK).cpu()
        with second():
            assert torch.equal(encoder(IDS, MASK).cpu(), expected)


@pytest.mark.cuda
@needs_gpu
def test_graphs_note_what_is_not_finite_in_the_rows_that_count_alone() -> None:
    stack = stack_of(TOY_CONFIGS["v1.1"])
    stack.shared.weight[7] = float("inf")
    encoder = cuda_encoder(stack)
    bad, good = torch.full((1, 30), 7), torch.full((1, 20), 8)
    # The good row is shorter: rows behind it are still those of the bad one.
    notes = [encoder.encode(ids).finite for ids in (good, bad, good, bad, good)]
    assert [int(note) for note in notes] == [1, 0, 1, 0, 1]


@pytest.mark.cuda
@needs_gpu
def test_calls_from_several_streams_and_threads_do_not_meet() -> None:
    stack = stack_of(TOY_CONFIGS["v1.1"])
    encoder = cuda_encoder(stack)
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 96, (1, length), generator=generator) for length in (20, 30, 60, 200)]
    expected = [encoder(ids) for ids in prompts]
    torch.cuda.synchronize()
    wrong = []

    def call(index: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(encoder(prompts[index]), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------------------------------------------------------------
# Compiled for GPUs that are not here
# ---------------------------------------------------------------------------------------------------------------------

# Bytes of shared memory that one program may have.
SHARED_LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_LIMITS)
def test_every_kernel_compiles_without_spilling(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    root = Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", str(root))
    command = [sys.executable, "tests/compile_for_gpus.py", str(capability)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    usages = [json.loads(line) for line in done.stdout.splitlines()]
    assert {usage["kernel"] for usage in usages} == {"attend", "add_norm", "gate", "multiply"}
    beyond = [usage for usage in usages if usage["STACK"] or usage["shared"] > SHARED_LIMITS[capability]]
    assert beyond == []
