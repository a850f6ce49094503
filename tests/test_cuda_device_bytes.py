"""Weights in 8 bits as users have them, on a CUDA device: run with ``pytest -m cuda``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_toys import assert_near
from toy_loras import toy_lora

from nai_t5_core.backends.cuda.card import card_of
from nai_t5_core.backends.cuda.device_refusals import missing_to_overlap
from nai_t5_core.backends.cuda.encoder import CudaEncoder, cuda_encoder
from nai_t5_core.backends.cuda.runner import CudaRunner
from nai_t5_core.backends.quantised.projections import QuantisedLinear
from nai_t5_core.bench.doctor import DoctorSettings, eight_bits
from nai_t5_core.bench.doctor.patient import Patient
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.weights.convert_quantised import convert_quantised

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

PROMPTS = ["a red cat", "", "two dogs play with a ball in the park, soft light, 35mm film", "a fox"]
LONG = ["a small boat on the sea at night, " * 40]
KINDS = ("quantize", "int8", "q8_0", "float8")


def encoder_of(kind: str, folder: Path, device: str = "cuda", dtype: str = "float16", **options: Any) -> TextEncoder:
    if kind == "quantize":
        return TextEncoder.from_pretrained(device=device, dtype=dtype, quantize="int8", **options)
    file = folder / f"{kind}.safetensors"
    if not file.exists():
        convert_quantised(None, file, kind)  # type: ignore[arg-type]
    return TextEncoder.from_pretrained(file, device=device, dtype=dtype, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bytes")


def exact_of(kind: str, folder: Path) -> TextEncoder:
    """The numbers that the bytes stand for, in float64; of what we quantise, those before."""
    if kind == "quantize":
        return TextEncoder.from_pretrained(device="cpu", dtype="float64")
    return encoder_of(kind, folder, "cpu", "float64", unpack=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_prompts_are_encoded_as_on_the_cpu(kind: str, dtype: str, folder: Path) -> None:
    encoder = encoder_of(kind, folder, dtype=dtype)
    told = {"quantize": "int8", "int8": "int8", "q8_0": "Q8_0", "float8": "float8_e4m3fn"}
    assert f"kernels for CUDA, {told[kind]} weights" in repr(encoder)
    exact = exact_of(kind, folder)
    limit = 0.05 if kind == "quantize" or dtype == "bfloat16" else 5e-3
    for prompts in (PROMPTS, LONG, PROMPTS):
        found, expected = encoder.encode(prompts), exact.encode(prompts)
        assert_near(found.hidden_states.double().cpu(), expected.hidden_states, limit)


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_give_what_single_launches_give(kind: str, folder: Path) -> None:
    stack = encoder_of(kind, folder).stack
    for choice in ("auto", "torch", "8-bit"):
        graphs = cuda_encoder(stack, products=choice)  # type: ignore[arg-type]
        eager = cuda_encoder(stack, eager=True, products=choice)  # type: ignore[arg-type]
        for tokens in (5, 64, 100, 256, 500, 30):
            ids = torch.randint(3, 96, (1, tokens), generator=torch.Generator().manual_seed(tokens))
            with torch.no_grad():
                may_round_inputs = choice == "8-bit" or (choice == "auto" and kind == "quantize")
                assert_near(graphs(ids).double(), eager(ids).double(), 0.05 if may_round_inputs else 5e-3)


@pytest.mark.parametrize(("prompts", "as_numbers"), [(LONG, ["q8_0"]), (PROMPTS, ["q8_0", "float8"])])
def test_both_sides_in_8_bits_are_near(prompts: list[str], as_numbers: list[str], folder: Path) -> None:
    for kind in KINDS:
        encoder = encoder_of(kind, folder)
        encoder.stack.runner = CudaRunner(products="triton")
        expected = encoder.encode(prompts).hidden_states
        encoder.stack.runner = CudaRunner(products="8-bit")
        found = encoder.encode(prompts).hidden_states
        assert found.isfinite().all()
        assert torch.equal(found, expected) == (kind in as_numbers)
        assert float((found - expected).float().norm() / expected.float().norm()) < 0.2


def test_launches_of_int8_that_overlap_give_the_same(folder: Path) -> None:
    """From graphs and one by one; where the card can."""
    from nai_t5_core.backends.cuda.byte_products import byte_configurations_on
    from nai_t5_core.backends.cuda.eight_bit_products import EightBitProducts
    from nai_t5_core.backends.cuda.torch_products import TorchProducts

    card = card_of(torch.device("cuda"))
    if card is None or not card.can_overlap or missing_to_overlap():
        pytest.skip("this card, or Triton here, has no launches that overlap")
    stack = encoder_of("quantize", folder).stack
    ways = [
        CudaEncoder(
            stack,
            eager,
            EightBitProducts(
                TorchProducts(), byte_configurations_on(card), card.converts_float8, int8_overlapping_rows=overlapping
            ),
        )
        for eager in (True, False)
        for overlapping in (0, 128)
    ]
    for tokens in (1, 16, 40, 64, 128, 30):
        ids = torch.randint(3, 96, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            for _ in range(20):
                first, *others = [encode(ids) for encode in ways]
                assert all(torch.equal(other, first) for other in others)


def test_the_card_never_has_the_weights_twice() -> None:
    """From the first byte on: 8 bits, a table in 16, and a part of a projection on its way."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    encoder = TextEncoder.from_pretrained(device="cuda", dtype="float16", quantize="int8")
    stack = encoder.stack
    held = sum(tensor.nbytes for tensor in (*stack.parameters(), *stack.buffers()))
    linears = [module for module in stack.modules() if isinstance(module, QuantisedLinear)]
    held += sum(form.weight.nbytes for linear in linears for form in linear.forms)
    largest = max(linear.in_features * linear.out_features for linear in linears)
    # Allocations are rounded up to 512 bytes, and small ones share 2 MB.
    room = (2 + 3 * 4) * largest + 512 * 40 * len(linears) + (4 << 20)
    assert torch.cuda.max_memory_allocated() - before < held + room
    assert torch.cuda.memory_allocated() - before < held + 512 * 40 * len(linears) + (4 << 20)


@pytest.mark.parametrize("kind", KINDS)
def test_live_loras_and_moves(kind: str, folder: Path) -> None:
    encoder = encoder_of(kind, folder)
    before = encoder.encode(PROMPTS).hidden_states
    loras = LiveLoras(encoder)
    loras.add(toy_lora(encoder.stack.config), 0.5)
    assert "not the kernels" in repr(encoder)
    assert not torch.allclose(encoder.encode(PROMPTS).hidden_states, before, atol=1e-2)
    loras.clear()
    assert torch.equal(encoder.encode(PROMPTS).hidden_states, before)
    copied = copy.deepcopy(encoder.stack)
    assert len({form.weight.device for form in forms_of(copied)}) == 1
    encoder.stack.cpu()
    assert_near(encoder.encode(PROMPTS).hidden_states.double(), before.double().cpu(), 2e-2)
    encoder.stack.cuda()
    assert_near(encoder.encode(PROMPTS).hidden_states.double(), before.double(), 5e-3)
    assert "kernels for CUDA" in repr(encoder) and "not the kernels" not in repr(encoder)


def forms_of(stack: Any) -> list[Any]:
    return [form for module in stack.modules() if isinstance(module, QuantisedLinear) for form in module.forms]


def test_the_doctor_finds_nothing_wrong() -> None:
    found = eight_bits.check(Patient(DoctorSettings(device="cuda")))
    assert found["wrong"] == [] and found["checked"] > 0
