"""Our kernels for CUDA on layers that are brought: on a simulated device in Triton's interpreter, or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from byte_toys import quantised_stack
from conftest import TOY_CONFIGS
from cuda_toys import HAS_GPU, stack_of
from simulated_device import SimulatedDevice
from test_cuda_encoder import CHANGES, IDS, KINDS, MASK, SCALES
from toy_loras import toy_lora

from nai_t5_core.backends.cuda.device_refusals import missing_triton
from nai_t5_core.backends.cuda.encoder import cuda_encoder
from nai_t5_core.backends.cuda.refusals import refuses_for_good
from nai_t5_core.backends.offload.offload import offload_layers
from nai_t5_core.float16.guard import guard
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.packing import PADDING_POLICIES, PaddingPolicy

if missing := missing_triton():
    pytest.skip(missing, allow_module_level=True)
if HAS_GPU:
    pytest.skip("test_offload_on_cuda.py has the real device", allow_module_level=True)

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


@pytest.mark.parametrize("kind", ["int8", "Q8_0"])
def test_quantised_layers_are_left_to_torch(kind: str) -> None:
    stack = quantised_stack(kind)
    expected = stack(IDS, MASK)
    assert refuses_for_good(stack) is None, "else it would be left to torch for another reason"
    offload: Any = offload_layers(stack).offload
    offload.start(stack, SimulatedDevice())
    words = "not the kernels for CUDA, layer by layer: its layers are quantised and offloaded"
    assert words in stack.describe_attention()
    assert torch.equal(stack(IDS, MASK), expected)


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
