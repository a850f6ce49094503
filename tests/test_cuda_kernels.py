"""The kernels for CUDA: in the interpreter or on a GPU against float64, and compiled for GPUs that are not here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_toys import DEVICE, DTYPES, ONE_ROUNDING, PRODUCT_DTYPES, draw, error

from nai_t5_core.backends.cuda.device_refusals import missing_triton
from nai_t5_core.backends.cuda.documents import document_table
from nai_t5_core.facts.config import Activation
from nai_t5_core.model.attention import DocumentAttention
from nai_t5_core.model.layers import ACTIVATIONS
from nai_t5_core.model.packing import DocumentGroup

if missing := missing_triton():
    pytest.skip(missing, allow_module_level=True)

from nai_t5_core.backends.cuda.attention_shapes import B200, RDNA3, AttentionShape, candidates
from nai_t5_core.backends.cuda.launches import Documents, Watch, add_norm, attend, attention_table, gate
from nai_t5_core.backends.cuda.products import ESTIMATED, HOPPER, Configuration, TritonProducts, product
from nai_t5_core.backends.cuda.torch_products import sums_in_float32

WIDTHS = (16, 100, 768, 2560)
# Every shape that is tried or taken on some card.
SHAPES = list(dict.fromkeys((*candidates(1024), *candidates(1024, "gfx1100"), RDNA3.longer, B200.longer)))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


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


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_with_a_weight_of_any_dtype_is_scaled_before_it_is_rounded(
    weight_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    residual, weight = draw(3, 100) * 7, (draw(100, seed=2).abs() + 0.5).to(weight_dtype)
    exact = F.rms_norm(residual.double(), (100,), weight.double(), 1e-6)
    for scale in (1.0, 2.0**-3):
        out = add_norm(residual.clone(), None, 1.0, 1e-6, dtype, weight, factor=scale)
        assert error(out, exact * scale) < ONE_ROUNDING[dtype]


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_noted_among_those_that_count(fault: float) -> None:
    for faulty, expected in ((1, 0), (2, 0), (3, 1)):
        residual = draw(5, 100)
        residual[faulty, 7] = fault
        finite = torch.ones(1, dtype=torch.int32, device=DEVICE)
        watch = Watch(finite, torch.tensor([3], dtype=torch.int32, device=DEVICE))
        add_norm(residual, None, 1.0, 1e-6, torch.float16, watch=watch)
        assert int(finite) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_is_the_gates_alone(dtype: torch.dtype) -> None:
    joined = draw(3, 200, dtype=dtype)
    gates, ups = joined.double().chunk(2, -1)
    exact = F.gelu(4 * gates, approximate="tanh") * ups
    assert error(gate(joined, "gelu_new", True, factor=4.0), exact) < ONE_ROUNDING[dtype]
    assert error(gate(joined, "relu", False, factor=0.5), F.relu(joined.double()) / 2) < ONE_ROUNDING[dtype]


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
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_documents_attend_to_their_own_keys(
    groups: list[DocumentGroup], heads: int, d_kv: int, shape: AttentionShape, dtype: torch.dtype
) -> None:
    tokens, scale = groups[-1].stop, d_kv**-0.5
    qkv = draw(tokens, 3 * heads * d_kv, dtype=dtype)
    table = draw(heads, 65, seed=1, dtype=dtype if shape.queries == 16 else torch.float32)
    q, k, v = qkv.double().unflatten(-1, (3, heads, d_kv)).unbind(1)
    exact = DocumentAttention(groups, scale).layer(table.double())(q, k, v).flatten(-2)
    documents = Documents(document_table(groups, shape.queries).to(DEVICE), shape)
    found = attend(qkv, attention_table(table), documents, scale)
    assert found.dtype == dtype
    assert error(found, exact) < 2 * ONE_ROUNDING[dtype]


def test_attention_without_keys_sees_no_logits() -> None:
    qkv = draw(5, 3 * 16, dtype=torch.float16)
    qkv[:, :32] = float("inf")
    documents = Documents(document_table([DocumentGroup(0, 1, 5, 0, 0)], 16).to(DEVICE), SHAPES[0])
    found = attend(qkv, attention_table(draw(1, 9)), documents, 1.0)
    torch.testing.assert_close(found, qkv[:, 32:].float().mean(0).half().expand(5, 16), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_bias_is_read_beyond_its_table(shape: AttentionShape) -> None:
    """What lies before and behind the table is not a number."""
    bias = draw(1, 9)
    table = attention_table(bias)
    surrounded = torch.full((3, table.shape[1]), float("nan"), device=DEVICE)
    surrounded[1] = table[0]
    for rows, key_start, keys in ((1, 0, 1), (300, 0, 300), (300, 299, 1), (300, 0, 1), (299, 150, 149), (130, 3, 64)):
        group = DocumentGroup(0, 1, rows, key_start, keys)
        documents = Documents(document_table([group], shape.queries).to(DEVICE), shape)
        qkv = draw(rows, 3 * 16, dtype=torch.float16)
        found = attend(qkv, surrounded[1:2], documents, 1.0)
        assert found.isfinite().all()
        q, k, v = qkv.double().unflatten(-1, (3, 1, 16)).unbind(1)
        exact = DocumentAttention([group], 1.0).layer(bias.double())(q, k, v).flatten(-2)
        assert error(found, exact) < 2 * ONE_ROUNDING[torch.float16]


def test_surplus_blocks_of_a_table_write_nothing() -> None:
    qkv, bias = draw(20, 3 * 16, dtype=torch.float16), attention_table(draw(1, 9))
    table = document_table([DocumentGroup(0, 1, 20, 0, 20)], 16)
    padded = F.pad(table, (0, 0, 0, 3)).to(DEVICE)
    expected = attend(qkv, bias, Documents(table.to(DEVICE), SHAPES[0]), 1.0)
    assert torch.equal(attend(qkv, bias, Documents(padded, SHAPES[0]), 1.0), expected)


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
    found = TritonProducts(ESTIMATED).activated(x, weight, activation, is_gated)
    assert found.dtype == dtype
    assert error(found, ACTIVATIONS[activation](gates) * up) < ONE_ROUNDING[dtype]


@pytest.mark.parametrize("sizes", [(768, 768), (1536, 512), (512, 384), (1024, 2816), (80, 64), (64, 80), (40, 24)])
def test_products_of_every_size_are_right(sizes: tuple[int, int]) -> None:
    columns, depth = sizes
    weight = draw(columns, depth, seed=1, dtype=torch.float16)
    for rows in (2, 130) if depth < 100 else (2,):
        x = draw(rows, depth, dtype=torch.float16)
        exact = x.double() @ weight.double().T
        summed = TritonProducts(ESTIMATED).summed(x, weight)
        assert error(summed.double().sum(0) if summed.ndim == 3 else summed, exact) < ONE_ROUNDING[torch.float16]
        assert error(TritonProducts(ESTIMATED).plain(x, weight), exact) < ONE_ROUNDING[torch.float16]


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
    for known in (ESTIMATED, HOPPER):
        assert set(known) == {(kind, rows) for kind in ("plain", "gated", "summed") for rows in (16, 32, 64, 128)}


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
