"""Makes torch's compiler believe that this process has a GPU, to compile for it; nothing can run.

For a process of its own: what is replaced in torch and Triton stays replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import triton
from cards import CARDS, Card, usage
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, config
from torch._inductor.fx_passes import fuse_attention, joint_graph, pad_mm
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses import fake_tensor
from triton.backends.compiler import GPUTarget


class _NoDevice:
    """In place of torch.cuda.device: nothing is current, and nothing is restored."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


class _Driver:
    """Triton's driver, as far as compiling asks it."""

    launcher_cls = staticmethod(lambda *_: None)

    def __init__(self, capability: int, card: Card) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {
                "max_shared_mem": card.shared,
                "multiprocessor_count": card.multiprocessors,
                "max_num_regs": 65536,
                "warpSize": 32,
            },
            load_binary=lambda *_: (0, 0, 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, *_: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda


def pretend(capability: int) -> list[dict[str, Any]]:
    """Makes torch and Triton compile for this capability from now on; the list gets what each kernel takes."""
    card = CARDS[capability]
    properties = SimpleNamespace(
        name=f"a card of compute capability {capability / 10}",
        major=capability // 10,
        minor=capability % 10,
        total_memory=24 << 30,
        multi_processor_count=card.multiprocessors,
        warp_size=32,
        max_threads_per_multi_processor=card.threads,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=card.shared,
        shared_memory_per_multiprocessor=card.shared + 1024,
        L2_cache_size=40 << 20,
    )
    answers = {
        "_lazy_init": None,
        "is_available": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": divmod(capability, 10),
        "get_compute_capability": capability,
        "get_raw_stream": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "synchronize": None,
        **dict.fromkeys(("set_device", "exchange_device", "maybe_exchange_device"), 0),
        **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), 0),
    }
    for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
        _answer(owner, answers)
    for name in ("getDevice", "setDevice", "exchangeDevice", "maybeExchangeDevice", "getCurrentRawStream"):
        _answer(torch._C, {f"_cuda_{name}": 0})
    torch.cuda.device = torch.cuda._DeviceGuard = CudaInterface.device = _NoDevice  # type: ignore[misc, assignment]
    driver = _Driver(capability, card)
    triton.runtime.driver.set_active(driver)
    triton_helpers.set_driver_to_gpu = lambda: triton.runtime.driver.set_active(driver)
    torch._C._ensureCUDADeviceGuardSet()
    torch.compiler.config.force_disable_caches = True
    # Every kernel is compiled in this process, by Triton's own classes, which tell what was compiled.
    config.compile_threads, config.use_static_cuda_launcher = 1, False
    # These would compute something on the device.
    _answer(fake_tensor, {"init_gpu_context": None})
    _answer(fuse_attention, {"_sfdp_init": None})
    _answer(pad_mm, {"_pad_mm_init": None})
    _answer(joint_graph, {"constant_fold_uniform_value": None})
    torch.compile = partial(torch.compile, backend=_compile_only)  # type: ignore[assignment]
    return _record_kernels()


def _answer(owner: Any, answers: dict[str, Any]) -> None:
    for name, value in answers.items():
        setattr(
            owner,
            name,
            staticmethod(lambda *_, value=value, **__: value)
            if isinstance(owner, type)
            else lambda *_, value=value, **__: value,
        )


def _record_kernels() -> list[dict[str, Any]]:
    """Replaces the loading of kernels onto a device by a note of what each takes."""
    found: list[dict[str, Any]] = []

    def note(self: Any) -> None:
        for result in self.compile_results:
            kernel = result.kernel
            used = usage(kernel.asm["cubin"])
            name = self.inductor_meta["kernel_name"]
            found.append({"kernel": name, "warps": result.config.num_warps, **used, "shared": kernel.metadata.shared})
        self.launchers = [lambda *_, **__: None]

    CachingAutotuner._make_launchers = note
    return found


class _Compiled(Exception):  # noqa: N818
    """Everything is compiled, and nothing can run."""


def _compile_only(graph: Any, inputs: Any, **_: Any) -> Any:
    """A backend of torch.compile that compiles by inductor and then ends the call by :class:`_Compiled`."""
    compile_fx.compile_fx(graph, inputs)

    def end(*_: Any) -> None:
        raise _Compiled

    return end


@contextmanager
def no_values() -> Iterator[None]:
    """Makes tensors without values; a call of a compiled function compiles, and ends this context."""
    with torch.no_grad(), fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        try:
            yield
        except _Compiled:
            return
