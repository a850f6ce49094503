"""Our kernels for CUDA on layers that are brought: on a simulated device in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from byte_toys import CONFIGS, quantised_stack
from byte_toys import KINDS as BYTE_KINDS
from conftest import TOY_CONFIGS
from cuda_toys import HAS_GPU, stack_of
from simulated_device import RaceError, SimulatedDevice
from test_cuda_encoder import CHANGES, IDS, KINDS, MASK, SCALES
from toy_loras import toy_lora

from nai_t5_core.backends.cuda.device_refusals import missing_triton
from nai_t5_core.backends.cuda.encoder import cuda_encoder
from nai_t5_core.backends.cuda.int8 import quantise_at_rest, quantise_stack
from nai_t5_core.backends.offload.offload import Offload, offload_layers
from nai_t5_core.backends.offload.weights import weights_of
from nai_t5_core.backends.quantised.packing import pack
from nai_t5_core.backends.quantised.projections import QuantisedForm, QuantisedLinear
from nai_t5_core.float16.guard import guard
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.packing import PADDING_POLICIES, PaddingPolicy

if missing := missing_triton():
    pytest.skip(missing, allow_module_level=True)
if HAS_GPU:
    pytest.skip("test_offload_on_cuda.py has the real device", allow_module_level=True)

from nai_t5_core.backends.cuda import encoder
from nai_t5_core.backends.cuda.attention_shapes import USUAL
from nai_t5_core.backends.cuda.byte_weight import JoinedForm
from nai_t5_core.backends.cuda.card import Card
from nai_t5_core.backends.cuda.card_choice import Choice, Row
from nai_t5_core.backends.offload import kernels as layer_by_layer

BY_KERNELS = "auto: kernels for CUDA, layer by layer"


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def offloaded(stack: T5EncoderStack, device: SimulatedDevice) -> T5EncoderStack:
    offload: Any = offload_layers(stack).offload
    offload.start(stack, device)
    stack.guard = guard
    assert stack.describe_attention() == BY_KERNELS
    return stack


# Every kind, dtype and policy; the interpreter takes seconds for each.
CASES: list[tuple[str, torch.dtype, PaddingPolicy]] = [(kind, torch.float16, "skip") for kind in KINDS]
CASES += [("v1.1", torch.float16, padding) for padding in PADDING_POLICIES if padding != "skip"]
CASES += [("umt5", torch.bfloat16, "exact")]


@pytest.mark.parametrize(("kind", "dtype", "padding"), CASES)
def test_every_bit_is_what_it_is_of_a_resident_one(kind: str, dtype: torch.dtype, padding: PaddingPolicy) -> None:
    config, extra_pad = TOY_CONFIGS[kind], 2 if padding in ("skip", "trim") else 0
    stack = stack_of(config, dtype, SCALES if dtype == torch.float16 else None)
    expected = cuda_encoder(stack, eager=True)(IDS, MASK, padding, extra_pad)
    device = SimulatedDevice()
    offloaded(stack, device)
    for _ in range(2):
        device.copies.clear()
        assert torch.equal(stack(IDS, MASK, padding=padding, extra_pad=extra_pad), expected)
    assert [len(pieces) for pieces in device.copies] == [1] * config.num_layers


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(change: Any) -> None:
    stack, twin = stack_of(TOY_CONFIGS["umt5"]), stack_of(TOY_CONFIGS["umt5"])
    offloaded(stack, SimulatedDevice())
    before = stack(IDS, MASK)
    for one in (stack, twin):
        change(one)
    found = stack(IDS, MASK)
    assert not torch.equal(found, before)
    assert torch.equal(found, cuda_encoder(twin, eager=True)(IDS, MASK))
    assert stack.describe_attention() == BY_KERNELS


def test_live_loras_are_computed_by_the_modules_and_the_kernels_come_back() -> None:
    stack = offloaded(stack_of(TOY_CONFIGS["v1.1"]), SimulatedDevice())
    before, loras = stack(IDS, MASK), LiveLoras(stack)
    loras.add(toy_lora(TOY_CONFIGS["v1.1"].encoder_only()), 0.5)
    assert not torch.equal(stack(IDS, MASK), before) and "LiveLinear" in stack.describe_attention()
    loras.clear()
    assert torch.equal(stack(IDS, MASK), before) and stack.describe_attention() == BY_KERNELS


# ---------------------------------------------------------------------------------------------------------------------
# Weights in 8 bits
# ---------------------------------------------------------------------------------------------------------------------

LONG = torch.randint(0, 96, (1, 140), generator=torch.Generator().manual_seed(6))


BYTE_CASES = [(kind, "v1.1", torch.float16) for kind in ("int8 by us", *BYTE_KINDS)]
BYTE_CASES += [(kind, "umt5", torch.bfloat16) for kind in ("int8 by us", "Q8_0", "float8")]


@pytest.mark.parametrize(("kind", "config", "dtype"), BYTE_CASES)
def test_bytes_are_computed_as_those_of_a_resident_one(kind: str, config: str, dtype: torch.dtype) -> None:
    scales = SCALES if dtype == torch.float16 else None
    expected = cuda_encoder(quantised_stack(kind, CONFIGS[config], dtype, scales), eager=True)(IDS, MASK, "skip")
    stack, device = quantised_stack(kind, CONFIGS[config], dtype, scales), SimulatedDevice()
    kept = bytes_of(stack)
    offloaded(stack, device)
    for _ in range(2):
        device.copies.clear()
        assert torch.equal(stack(IDS, MASK, padding="skip"), expected)
    layers = stack.config.num_layers
    assert [len(pieces) for pieces in device.copies] == [1] * layers
    # As many bytes as are in the file, and nothing beside them but to begin at a multiple of 256.
    assert kept <= sum(map(sum, device.copies)) < kept + 256 * 20 * layers
    assert bytes_of(stack) == kept
    assert sum(memory.nbytes for memory in device._locked.values()) < kept + 256 * 20 * layers


@pytest.mark.parametrize("kind", ["int8 by us", "Q8_0", "float8 by row"])
def test_long_rows_are_unpacked_where_the_bytes_have_come(kind: str) -> None:
    expected = cuda_encoder(quantised_stack(kind), eager=True)(LONG)
    assert torch.equal(offloaded(quantised_stack(kind), SimulatedDevice())(LONG), expected)


def test_inputs_in_8_bits_are_those_of_a_resident_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card on which they were measured to be faster from 32 tokens on, or the 17 that a graph for 32 computes."""
    choice = Choice(Card("a card", "sm_89"), Row("a card", int8_inputs_from=32))
    for module in (encoder, layer_by_layer):
        monkeypatch.setattr(module, "card_of", lambda _: Card("a card", "sm_89"))
        monkeypatch.setattr(module, "shapes_for", lambda *_: USUAL)
    monkeypatch.setattr(encoder, "choice_for", lambda _: choice)
    stack = quantised_stack("int8 by us")
    ids = torch.randint(0, 96, (1, 17), generator=torch.Generator().manual_seed(3))
    expected = cuda_encoder(stack, eager=True)(ids)
    assert not torch.equal(expected, cuda_encoder(stack, eager=True, products="triton")(ids))
    device = SimulatedDevice()
    assert torch.equal(offloaded(stack, device)(ids), expected)


def bytes_of(stack: Any) -> int:
    return sum(tensor.nbytes for block in stack.encoder.block for tensor in weights_of(block))


class Reading:
    """Products that tell a device which of its memory they read, as torch's operations do by themselves."""

    def __init__(self, products: Any, device: SimulatedDevice) -> None:
        self.products, self.device, self.read = products, device, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.products, name)
        return partial(self._by, found) if name in ("plain", "activated", "summed") else found

    def _by(self, product: Any, x: Any, weight: Any, *others: Any) -> Any:
        for tensor in (weight.values, weight.block_scales):
            if tensor is not None:
                assert self.device._is_here(tensor), "read where it rests"
                work = self.device.work
                self.device._accessed(tensor, work, work.run(tensor.nbytes), is_write=False)
                self.read += 1
        return product(x, weight, *others)


class WithoutWaiting(SimulatedDevice):
    def wait(self, event: Any, memory: Any) -> None:
        pass


@pytest.mark.parametrize("faulty", [False, True])
@pytest.mark.parametrize("kind", ["int8 by us", "Q8_0"])
def test_bytes_are_read_after_they_have_come_and_before_others_come(kind: str, faulty: bool) -> None:
    device = WithoutWaiting() if faulty else SimulatedDevice()
    stack: Any = offloaded(quantised_stack(kind), device)
    encoder = stack.runner._encoder_of(stack)
    products = encoder._products = Reading(encoder._products, device)
    with pytest.raises(RaceError) if faulty else nullcontext():
        for _ in range(2):
            stack(IDS, MASK)
    assert faulty or products.read == 2 * stack.config.num_layers * 4 * (2 if kind == "Q8_0" else 1)


def requantised(stack: Any) -> None:
    other: Any = quantised_stack("Q8_0")
    stack.encoder.block[1].layer[0].SelfAttention.o = other.encoder.block[1].layer[0].SelfAttention.o


def scaled(stack: Any) -> None:
    stack.encoder.block[0].layer[1].DenseReluDense.wi.multiply_rows(3.0, 0)


def exchanged(stack: Any) -> None:
    """A projection that is not quantised beside those that are."""
    plain: Any = stack_of(CONFIGS["v1.1"])
    stack.encoder.block[2].layer[1].DenseReluDense.wo = plain.encoder.block[0].layer[1].DenseReluDense.wo


@pytest.mark.parametrize("change", [requantised, scaled, exchanged])
def test_changed_bytes_are_seen(change: Any) -> None:
    stack, twin, device = quantised_stack("int8 by us"), quantised_stack("int8 by us"), SimulatedDevice()
    offloaded(stack, device)
    before = stack(IDS, MASK)
    for one in (stack, twin):
        change(one)
    found = stack(IDS, MASK)
    assert not torch.equal(found, before) and torch.equal(found, cuda_encoder(twin, eager=True)(IDS, MASK))
    assert stack.describe_attention() == BY_KERNELS
    assert all(device.is_locked(tensor) for block in stack.encoder.block for tensor in weights_of(block))


def test_a_live_lora_is_computed_from_the_same_bytes() -> None:
    stack = offloaded(quantised_stack("Q8_0"), SimulatedDevice())
    before, loras = stack(IDS, MASK), LiveLoras(stack)
    loras.add(toy_lora(CONFIGS["v1.1"].encoder_only()), 0.5)
    assert "LiveLinear" in stack.describe_attention()
    twin = quantised_stack("Q8_0")
    LiveLoras(twin).add(toy_lora(CONFIGS["v1.1"].encoder_only()), 0.5)
    assert torch.equal(stack(IDS, MASK), twin(IDS, MASK))
    loras.clear()
    assert torch.equal(stack(IDS, MASK), before)


@pytest.mark.parametrize("kind", ["int8 by us", "Q8_0", "float8"])
def test_bytes_go_back_to_the_cpu_and_are_copied_as_in_their_file(kind: str) -> None:
    resident, stack, device = quantised_stack(kind), quantised_stack(kind), SimulatedDevice()
    expected = resident(IDS, MASK)
    offload: Any = offloaded(stack, device).offload
    there = stack(IDS, MASK)
    offload.rest(stack)
    assert torch.equal(stack(IDS, MASK), expected)
    assert repr(stack) == repr(resident).replace(resident.describe_attention(), stack.describe_attention())
    offload.start(stack, device)
    assert torch.equal(stack(IDS, MASK), there)
    other = copy.deepcopy(stack)
    for module, own in zip(other.modules(), resident.modules(), strict=True):
        if isinstance(module, QuantisedLinear):
            assert [form.weight.kind for form in module.forms] == [form.weight.kind for form in own.forms]
            assert torch.equal(module.plain(), own.plain())


def kinds_in(stack: Any) -> set[Any]:
    return {form.weight.kind for module in stack.modules() for form in getattr(module, "forms", ())}


def test_bytes_that_cannot_be_offloaded_are_as_in_their_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the kernels for the CPU read; they do not read scales of blocks apart."""
    stack = quantised_stack("Q8_0")
    kinds = kinds_in(stack)
    expected, device = stack(IDS, MASK), SimulatedDevice(room=1000)
    monkeypatch.setattr(Offload, "move", lambda self, stack, change: self.start(stack, device))
    with pytest.raises(MemoryError, match="no room"):
        offload_layers(stack)
    assert kinds_in(stack) == kinds
    assert stack.offload is None and torch.equal(stack(IDS, MASK), expected)


def test_kinds_that_the_kernels_do_not_read_are_torchs_and_that_is_told() -> None:
    stack: Any = quantised_stack("int8", CONFIGS["v1.1"].model_copy(update={"d_ff": 256}))
    columns = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    form = QuantisedForm(pack(columns, "q4_k"))
    stack.encoder.block[1].layer[1].DenseReluDense.wo = QuantisedLinear([form], torch.float16)
    expected, device = stack(IDS, MASK), SimulatedDevice()
    offload: Any = offload_layers(stack).offload
    offload.start(stack, device)
    words = "not the kernels for CUDA, layer by layer: a projection is of kind Q4_K, which is unpacked in every call"
    assert words in stack.describe_attention()
    with device:
        assert torch.equal(stack(IDS, MASK), expected)
    assert not any(isinstance(form, JoinedForm) for each in stack.modules() for form in getattr(each, "forms", ()))


def test_int8_is_made_layer_by_layer_and_comes_layer_by_layer() -> None:
    resident, stack, device = stack_of(CONFIGS["v1.1"]), stack_of(CONFIGS["v1.1"], device="cpu"), SimulatedDevice()
    quantise_stack(resident, torch.device("cpu"))
    quantise_at_rest(stack, torch.device("cpu"))
    offloaded(stack, device)
    assert torch.equal(stack(IDS, MASK), cuda_encoder(resident, eager=True)(IDS, MASK))
    assert [len(pieces) for pieces in device.copies] == [1] * (stack.config.num_layers + 2)


def test_an_encode_that_breaks_off_leaves_the_order_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from nai_t5_core.backends.cuda.block import CudaBlock

    stack = offloaded(stack_of(TOY_CONFIGS["v1.1"]), SimulatedDevice())
    expected = stack(IDS, MASK)
    for name in ("add_attention", "feed_forward"):
        with monkeypatch.context() as patch:
            patch.setattr(CudaBlock, name, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                stack(IDS, MASK)
        assert torch.equal(stack(IDS, MASK), expected)
