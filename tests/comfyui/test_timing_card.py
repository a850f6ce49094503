"""That the comparison on a card runs ComfyUI as its main program does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dynamic_memory import Library, replace_library, require_dynamic_memory

require_dynamic_memory()


class Noting(Library):
    """Answers every call, and knows which there were."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> object:
        self.calls.append(name)
        return super().__getattr__(name)


def test_the_library_writes_no_more_than_in_comfyui(monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    from comfy_aimdo import control
    from timing_card import start_dynamic_memory

    library = Noting()
    replace_library(monkeypatch, library)
    monkeypatch.setattr(control, "devctxs", [])
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", False)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda: [torch.device("cuda", 0)])
    start_dynamic_memory()
    assert [name for name in library.calls if name == "init" or "log" in name] == ["init", "set_log_level_info"]
    assert comfy.memory_management.aimdo_enabled
    assert comfy.model_patcher.CoreModelPatcher is comfy.model_patcher.ModelPatcherDynamic


PROGRAM = """
import torch, timing_card
print("started", flush=True)
timing_card.allocate_as_comfyui()
print(torch.cuda.get_allocator_backend())
"""


@pytest.mark.slow
@pytest.mark.skipif("+cu" not in torch.__version__, reason="this torch is not for CUDA")
@pytest.mark.parametrize("before, starts", [(None, 2), ("backend:cudaMallocAsync", 1)])
def test_torch_allocates_as_in_comfyui(before: str | None, starts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program starts once more, unless torch was told already."""
    tests = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join(map(str, (tests.parent, tests, tests / "comfyui")))
    monkeypatch.setenv("PYTHONPATH", paths)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    if before is not None:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", before)
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.split() == ["started"] * starts + ["cudaMallocAsync"]
