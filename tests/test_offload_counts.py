"""What an encode with offloaded layers asks of a CUDA device, counted on a pretended one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from pretended_cuda import CUDA, PretendedCuda
from torch import Tensor

from nai_t5_core.backends.offload.offload import Offload, offload_layers
from nai_t5_core.backends.offload.weights import weights_of
from nai_t5_core.float16.guard import guard
from nai_t5_core.model.encoder import Layout
from nai_t5_core.model.layers import RMSNorm

CONFIG = TOY_CONFIGS["v1.1"].encoder_only()
LENGTH = 64
# As many as of a resident encoder, see test_cuda_counts.py.
LAUNCHES = {"fused": 14, "separate": 17}


class PretendedMover:
    """Copies as the device counts them; events are nothing, since nothing is computed."""

    device = CUDA

    def __init__(self, pretended: PretendedCuda) -> None:
        self.pretended = pretended
        self.buffers: list[int] = []
        self._locked: dict[int, Tensor] = {}

    def buffer(self, nbytes: int) -> Tensor:
        self.buffers.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    def locked(self, nbytes: int) -> Tensor:
        memory = torch.zeros(nbytes, dtype=torch.uint8)
        self._locked[memory.data_ptr()] = memory
        return memory

    def unlock(self, memory: Tensor) -> None:
        del self._locked[memory.data_ptr()]

    def is_locked(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._locked

    def worked(self) -> None:
        return None

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: None) -> None:
        for into, source in pairs:
            self.pretended.pinned.append(source)
            into.copy_(source, non_blocking=True)

    def wait(self, event: None, memory: Tensor) -> None:
        pass


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCuda]:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr("nai_t5_core.backends.offload.offload.refuses_for_good", lambda stack: "no kernels here")
    with torch.no_grad(), PretendedCuda() as device:
        yield device


def encode(device: PretendedCuda, layers: int, layout: Layout, mask: Tensor | None) -> tuple[Any, PretendedMover]:
    config = CONFIG.model_copy(update={"num_layers": layers})
    stack = build_stack(config, random_state(config), torch.float16, layout)
    stack.guard, stack.attention = guard, "sdpa"
    mover = PretendedMover(device)
    offload: Any = offload_layers(stack).offload
    assert isinstance(offload, Offload)
    offload.start(stack, mover)
    # A parameter cannot become a pretended tensor, so these are replaced.
    for module in stack.encoder.modules():
        if isinstance(module, (torch.nn.Embedding, RMSNorm)) and id(module.weight) not in brought(stack):
            device.put(module)
    ids = torch.ones(1 if mask is None else len(mask), LENGTH, dtype=torch.long)
    for _ in range(2):
        device.reset()
        assert stack(ids, mask, padding="skip").device.type == "cuda"
    return stack, mover


def brought(stack: Any) -> set[int]:
    return {id(weight) for block in stack.encoder.block for weight in weights_of(block)}


@pytest.mark.parametrize("layout", LAUNCHES)
@pytest.mark.parametrize("mask", [None, padding_mask([60] * 8, LENGTH)])
def test_a_copy_for_each_layer_and_one_wait(pretended: PretendedCuda, layout: Layout, mask: Tensor | None) -> None:
    launches = []
    for layers in (3, 5):
        stack, mover = encode(pretended, layers, layout, mask)
        # One for each layer, the rows of the embedding table, and, with a mask, the places of the rows that are left.
        assert dict(pretended.copies) == {("cpu", "cuda"): layers + (1 if mask is None else 2)}
        assert dict(pretended.waits) == {"_local_scalar_dense": 1}, "the host waits for what is not the check"
        assert pretended.float32_products == 0
        launches.append(pretended.launches.total())
        largest = max(sum(weight.nbytes for weight in weights_of(block)) for block in stack.encoder.block)
        assert len(mover.buffers) == 2 and largest <= mover.buffers[0] == mover.buffers[1] < largest + 256 * 8
    assert (launches[1] - launches[0]) / 2 <= LAUNCHES[layout]


def test_what_is_on_the_device_is_two_layers_and_tables(pretended: PretendedCuda) -> None:
    stack, _ = encode(pretended, 5, "fused", None)
    on_device = [tensor for tensor in [*stack.parameters(), *stack.buffers()] if tensor.device.type == "cuda"]
    assert sum(tensor.nbytes for tensor in on_device) == CONFIG.d_model * 4 + 32 * CONFIG.num_heads * 2
    assert stack.device.type == "cuda" and stack.shared.weight.device.type == "cpu"
