"""Newer ComfyUI's dynamic memory on a CPU: its own code, with pages and values, on a C library that is replaced.

The library keeps a range of addresses, whose pages are brought in, pinned and taken back as comfy-aimdo's are. A page
that is taken back loses what it had: its bytes become those of NaN. Pins are counted, and a page that has some stays.
Weights say that they are on another device than
the encoder, as the weights of a file are; what is brought in, and computed, is on the CPU.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import pytest
import torch
from comfy_toys import require_comfyui
from torch import Tensor, nn

OLDER = "this ComfyUI is older than dynamic memory"
# Of comfy-aimdo 32 MiB. So small that weights of a toy lie on several, and share some with others.
PAGE = 48 * 1024
# What takes no more is loaded with the model.
LEAST = 16 * 1024
# A device of the CPU that is not equal to what ComfyUI takes for the CPU, whose models it does not page.
CARD = torch.device("cpu", 0)


def require_dynamic_memory() -> None:
    """Skips the calling test file where ComfyUI has no dynamic memory."""
    require_comfyui()
    pytest.importorskip("comfy.memory_management", reason=OLDER)
    pytest.importorskip("comfy_aimdo.control", reason=OLDER)


class Library:
    """Answers every call of the C library that is not about pages, and notes what is freed."""

    def __init__(self) -> None:
        self.freed: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            if name.endswith("_free"):
                self.freed.append(name)
            return 0 if name.endswith("_free") else 4096

        return function


class Range:
    """A reserved range of addresses, and which of its pages are there."""

    def __init__(self, size: int) -> None:
        pages = -(-size // PAGE)
        self.memory = torch.full((pages * PAGE,), 255, dtype=torch.uint8)
        self.are_there = [False] * pages
        self.serials, self.pins = [0] * pages, [0] * pages
        self.watermark = pages


class PagedLibrary(Library):
    """As :class:`Library`, with pages.

    Attributes:
        most: how many pages may be there at once.
        faults: how often pages were asked for, by the bytes that were asked for at once.
        faults_left: how many more are answered before all fail; None where none does.
    """

    def __init__(self, most: int = 10_000) -> None:
        super().__init__()
        self.most = most
        self.ranges: list[Range] = []
        self.faults: Counter[int] = Counter()
        self.faults_left: int | None = None

    @property
    def there(self) -> int:
        """How many pages are there."""
        return sum(sum(each.are_there) for each in self.ranges)

    @property
    def pinned(self) -> int:
        """How many pages have pins."""
        return sum(count > 0 for each in self.ranges for count in each.pins)

    def vbar_allocate(self, context: Any, size: int, device: int) -> int:
        self.ranges.append(Range(size))
        return len(self.ranges)

    def vbar_get(self, context: Any, number: int) -> int:
        return self.ranges[number - 1].memory.data_ptr()

    def vbar_prioritize(self, context: Any, number: int) -> None:
        found = self.ranges[number - 1]
        found.watermark = len(found.are_there)

    def vbar_loaded_size(self, context: Any, number: int) -> int:
        return sum(self.ranges[number - 1].are_there) * PAGE

    def vbar_fault(self, context: Any, number: int, offset: int, size: int, signature: Any) -> int:
        self.faults[size] += 1
        if self.faults_left is not None:
            self.faults_left -= 1
            if self.faults_left < 0:
                return 2
        found = self.ranges[number - 1]
        pages = _pages(offset, size)
        if pages.stop > found.watermark:
            return 1
        for place, page in enumerate(pages):
            if not found.are_there[page]:
                while self.there >= self.most and found.watermark > pages.stop:
                    self._lower(found)
                if self.there >= self.most:
                    while found.watermark > page:
                        self._lower(found)
                    return 1
                found.are_there[page] = True
                found.serials[page] += 1
            signature[place] = found.serials[page]
        for page in pages:
            found.pins[page] += 1
        return 0

    def vbar_unpin(self, context: Any, number: int, offset: int, size: int) -> None:
        found = self.ranges[number - 1]
        for page in _pages(offset, size):
            # comfy-aimdo lets this pass; it would be the unpin of what someone else still uses.
            assert found.pins[page], f"page {page} is given back more often than it was found"
            found.pins[page] -= 1
            if page >= found.watermark:
                self._take_unless_pinned(found, page)

    def vbar_free_memory(self, context: Any, number: int, size: int) -> int:
        found = self.ranges[number - 1]
        before = self.there
        while found.watermark and (before - self.there) * PAGE < size:
            self._lower(found)
        return (before - self.there) * PAGE

    def _lower(self, found: Range) -> None:
        found.watermark -= 1
        self._take_unless_pinned(found, found.watermark)

    def _take_unless_pinned(self, found: Range, page: int) -> None:
        if not found.pins[page]:
            found.are_there[page] = False
            ctypes.memset(found.memory.data_ptr() + page * PAGE, 255, PAGE)


def _pages(offset: int, size: int) -> range:
    return range(offset // PAGE, -(-(offset + size) // PAGE))


class FileParameter(nn.Parameter):
    """A weight that is on the CPU and says that it is elsewhere."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta")


def replace_library(monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
    from comfy_aimdo import control, host_buffer, model_vbar

    for module in (control, host_buffer, model_vbar):
        monkeypatch.setattr(module, "lib", library)
    monkeypatch.setattr(control, "get_devctx", lambda device: 7)


def use_dynamic_memory(monkeypatch: pytest.MonkeyPatch, library: PagedLibrary) -> None:
    """Has ComfyUI put models that are to be on :data:`CARD` into its dynamic memory."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.pinned_memory
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch

    replace_library(monkeypatch, library)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.pinned_memory.args, "disable_pinned_memory", True)
    monkeypatch.setattr(comfy.model_management, "current_loaded_models", [])
    monkeypatch.setattr(comfy_aimdo.torch, "get_tensor_from_raw_ptr", _tensor_at)
    # Signatures are as long as comfy-aimdo's pages are many.
    monkeypatch.setattr(comfy_aimdo.model_vbar.ModelVBAR, "fault", _fault)


def _tensor_at(address: int, size: int, device: Any) -> Tensor:
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


def _fault(memory: Any, address: int, size: int) -> Any:
    from comfy_aimdo.control import lib

    signature = (ctypes.c_uint32 * (size // PAGE + 2))()
    given = (memory._devctx, memory._ptr, address - memory.base_addr, size, signature)
    answer = lib.vbar_fault(*given)
    if answer > 1:
        raise RuntimeError(f"Fault failed: {answer}")
    return None if answer else signature


def as_of_files(model: nn.Module) -> None:
    """Makes weights that dynamic memory brings in as they are used say that they are on another device."""
    for module in model.modules():
        if hasattr(module, "comfy_cast_weights") and module.weight.nbytes > LEAST:
            module.weight = FileParameter(module.weight.detach(), requires_grad=False)
