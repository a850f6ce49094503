"""Offloaded layers on a CUDA device: run with ``pytest -m cuda -s``, which prints times beside the bus's."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import encoder_part
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from offload_toys import WIDE
from test_offload import CHANGES
from toy_offloading import OFFLOADS
from toy_quantised import READ, quantised, write_quantised

from nai_t5_core.backends.choose import encode_on_cuda
from nai_t5_core.backends.cuda.encoder import cuda_encoder
from nai_t5_core.backends.cuda.refusals import refuses_for_good
from nai_t5_core.backends.offload.host_memory import HostMemory
from nai_t5_core.backends.offload.mover import CudaMover
from nai_t5_core.backends.offload.offload import offload_layers
from nai_t5_core.backends.offload.weights import weights_of
from nai_t5_core.bench.doctor.offload import time_offloaded
from nai_t5_core.facts.config import named_config
from nai_t5_core.float16.guard import guard
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.weights.load import load_encoder

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

CONFIG = TOY_CONFIGS["v1.1"].encoder_only()
MASK = padding_mask([0, 3, 11, 4], 11)
IDS = torch.randint(0, 96, MASK.shape, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def stack_of(kind: str = "v1.1", dtype: torch.dtype = torch.float16) -> T5EncoderStack:
    config = TOY_CONFIGS[kind].encoder_only()
    stack = build_stack(config, random_state(config), dtype)
    stack.guard = guard
    return stack


@pytest.mark.parametrize("kind", TOY_CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("by_kernels", [True, False])
def test_the_numbers_are_those_of_a_resident_one(kind: str, dtype: torch.dtype, by_kernels: bool) -> None:
    stack = stack_of(kind, dtype)
    resident = copy.deepcopy(stack).cuda()
    if by_kernels:
        encode_on_cuda(resident)
    offload_layers(stack, "cuda", by_kernels)
    holes = MASK.clone()
    holes[2, 3] = 0
    for mask in (None, MASK, holes, MASK[:, None] * MASK[:, :, None]):
        expected = resident(IDS, mask).double()
        for _ in range(2):
            difference = (stack(IDS, mask).double() - expected).norm() / expected.norm()
            assert float(difference) < (5e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("kind", READ)
def test_quantised_ones(kind: str, tmp_path: Path) -> None:
    file = write_quantised(tmp_path / "t5.safetensors", quantised(encoder_part(random_state(WIDE)), READ[kind][1]))
    resident, stack = load_encoder(file, "float16", "cuda"), load_encoder(file, "float16", "cpu")
    by_kernels = refuses_for_good(resident) is None
    # The same kernels, launched one by one as well.
    expected = (cuda_encoder(resident, eager=True) if by_kernels else resident)(IDS, MASK)
    offload_layers(stack, "cuda")
    assert stack.runner is not None and (stack.runner.refusal(stack) is None) == by_kernels
    for _ in range(2):
        assert torch.equal(stack(IDS, MASK), expected)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen_at_once(change: Any) -> None:
    stack = offload_layers(stack_of(dtype=torch.float32), "cuda")
    twin = stack_of(dtype=torch.float32).cuda()
    stack(IDS, MASK)
    for one in (stack, twin):
        change(one)
    expected = twin(IDS, MASK)
    torch.testing.assert_close(stack(IDS, MASK), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_threads_on_streams_of_their_own() -> None:
    stack = offload_layers(stack_of(), "cuda")
    prompts = [IDS[:, : 3 + number] for number in range(8)]
    expected = [stack(prompt) for prompt in prompts]

    def encode(prompt: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            return stack(prompt).cpu()

    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            found = list(pool.map(encode, prompts))
            assert all(torch.equal(a, b.cpu()) for a, b in zip(found, expected, strict=True))


def test_memory_is_two_layers_and_is_freed() -> None:
    config = named_config("t5-v1_1-base").encoder_only()
    stack = build_stack(config, random_state(config), torch.float16)
    layer = max(sum(weight.nbytes for weight in weights_of(block)) for block in stack.encoder.block)
    gc.collect()
    before = torch.cuda.memory_allocated()
    offload_layers(stack, "cuda")
    assert torch.cuda.memory_allocated() - before < 2.1 * layer + 2**20
    stack(IDS)
    torch.cuda.reset_peak_memory_stats()
    stack(IDS)
    assert torch.cuda.max_memory_allocated() - before < 3 * layer
    assert all(weight.is_pinned() for block in stack.encoder.block for weight in weights_of(block))
    stack.to("cpu")
    assert torch.cuda.memory_allocated() - before < 2**20
    gone = weakref.ref(stack)
    del stack
    gc.collect()
    assert gone() is None


def test_int8_of_a_model_in_the_hosts_memory() -> None:
    encoder = TextEncoder.from_pretrained(device="cuda", dtype="float16", offload=True, quantize="int8")
    resident = TextEncoder.from_pretrained(device="cuda", dtype="float16", quantize="int8")
    assert "kernels for CUDA, layer by layer" in repr(encoder)
    expected = cuda_encoder(resident.stack, eager=True)(IDS, MASK)
    assert torch.equal(encoder.stack(IDS, MASK), expected)


def test_memory_that_is_given_back_is_locked_no_more() -> None:
    mover = CudaMover(torch.device("cuda"))
    memory = mover.locked(1 << 20)
    memory.fill_(3)
    assert memory.is_pinned()
    mover.unlock(memory)
    assert not memory.is_pinned() and int(memory.sum()) == 3 << 20


def test_memory_that_cannot_be_locked_is_an_error_that_leaves_the_device_usable() -> None:
    memory = HostMemory(1 << 20)
    memory.lock(torch.device("cuda", torch.cuda.current_device()))
    with pytest.raises(MemoryError, match="did not lock"):
        memory.lock(torch.device("cuda", torch.cuda.current_device()))  # a second time
    assert float(torch.ones(3, device="cuda").sum()) == 3


def test_the_text_encoder() -> None:
    exact = TextEncoder.from_pretrained(device="cpu", dtype="float64")
    encoder = TextEncoder.from_pretrained(device="cuda", dtype="float16", offload=True)
    assert "offloaded layer by layer" in repr(encoder) and "kernels for CUDA, layer by layer" in repr(encoder)
    found = encoder.encode(["a red cat", ""], "pixart-sigma").hidden_states
    expected = exact.encode(["a red cat", ""], "pixart-sigma").hidden_states
    assert found.is_cuda and float((found.double().cpu() - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("in_8_bits", [False, True])
def test_time_beside_the_bus(in_8_bits: bool) -> None:
    """Of a T5-large with random weights; what a T5-XXL takes, ``nai-t5 doctor --full`` measures."""
    config = named_config("t5-v1_1-large").encoder_only()
    found = time_offloaded(config, torch.float16, torch.device("cuda"), in_8_bits)
    print(found)
    assert found["times"]["64"]["times the bus"] < 1.3


@pytest.mark.parametrize("kind", ["v1.1", "umt5"])
@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("groups", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}])
@pytest.mark.parametrize("stream", [{}, {"use_stream": True}, {"use_stream": True, "record_stream": True}])
def test_groups_of_diffusers(kind: str, layout: Any, groups: dict[str, Any], stream: dict[str, Any]) -> None:
    """A weight that is read before its copy has ended would show in one of many calls."""
    hooks = pytest.importorskip("diffusers.hooks")
    from hf_toys import hf_model

    from nai_t5_core.hf import NAIT5EncoderModel

    config = TOY_CONFIGS[kind].model_copy(update={"num_layers": 8})
    model = NAIT5EncoderModel.from_hf(hf_model(config, random_state(config)), layout=layout)
    ids, mask = IDS.cuda(), MASK.cuda()
    expected = copy.deepcopy(model).cuda()(ids, mask, output_hidden_states=True).hidden_states
    more = {"num_blocks_per_group": 1} if groups["offload_type"] == "block_level" else {}
    hooks.apply_group_offloading(model, torch.device("cuda"), torch.device("cpu"), **groups, **stream, **more)
    for _ in range(20):
        found = model(ids, mask, output_hidden_states=True).hidden_states
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
        found = model(ids, mask).last_hidden_state
        torch.testing.assert_close(found, expected[-1], rtol=1e-4, atol=1e-4 * float(expected[-1].abs().max()))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_pipelines_that_offload_beside_ours(offload: Any) -> None:
    """All of them find an encoder at rest; moved as a whole, it computes on the card layer by layer."""
    pytest.importorskip("diffusers")
    from toy_pipelines import make

    from nai_t5_core.diffusers.adapter import replace_text_encoder

    toy = make("pixart-sigma")
    expected = toy.run()
    replace_text_encoder(toy.pipe, offload=True)
    offload(toy.pipe, torch.device("cuda"))
    for _ in range(2):
        found = toy.run().cpu()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
