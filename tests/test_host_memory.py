"""Memory that is locked for a GPU: what CUDA is asked for, on a pretended CUDA."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from nai_t5_core.backends.offload import host_memory
from nai_t5_core.backends.offload.host_memory import HostMemory

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What CUDA was asked for, in order, each with its first number: an address or a device."""
    calls: list[tuple[str, int]] = []

    def register(address: int, nbytes: int, flags: int) -> int:
        calls.append(("lock", address))
        return 2 if nbytes > 1 << 20 else 0

    cudart = SimpleNamespace(
        cudaHostRegister=register, cudaHostUnregister=lambda address: calls.append(("unlock", address))
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(("wait", 0)))
    return calls


def test_memory_is_private_writable_and_unlocked_when_its_last_tensor_goes(asked: list[tuple[str, int]]) -> None:
    memory = HostMemory(5000)
    memory.lock(DEVICE)
    tensor = memory.tensor()
    address = tensor.data_ptr()
    assert address % 4096 == 0 and tensor.dtype == torch.uint8 and tensor.shape == (5000,)
    part = tensor[256:512].view(torch.float32)
    part.fill_(3)
    del memory, tensor
    gc.collect()
    assert asked == [("lock", address)] and float(part.sum()) == 3 * 64
    del part
    gc.collect()
    assert asked == [("lock", address), ("wait", 0), ("unlock", address)]


def test_memory_that_could_not_be_unlocked_is_unlocked_once_it_can(
    asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that failed tells so when it is waited for."""
    memory = HostMemory(5000)
    memory.lock(DEVICE)
    (lock,) = asked

    def failed(device: torch.device) -> None:
        raise RuntimeError("the device failed")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="the device failed"):
        patched.setattr(torch.cuda, "synchronize", failed)
        memory.unlock()
    memory.unlock()
    memory.unlock()
    assert asked == [lock, ("wait", 0), ("unlock", lock[1])]


def test_memory_that_is_not_locked_is_never_unlocked(
    asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "_clear_error", lambda device: asked.append(("clear", 0)))
    memory = HostMemory(1 << 21)
    with pytest.raises(MemoryError, match=r"did not lock 0\.00 GB .* free memory, allow more .* file in 8 or 4 bits"):
        memory.lock(DEVICE)
    del memory
    gc.collect()
    assert [what for what, _ in asked] == ["lock", "clear"]
