"""Newer ComfyUI's dynamic memory, its default on NVIDIA, as far as a CPU can run it: with its C library replaced."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_toys import V1_1, conditioning, require_comfyui, stock, toy_file
from pretended_cuda import CUDA, PretendedCuda

from comfy_nai_t5.choices import Settings
from nai_t5_core.float16.guard import ScaleTightenedWarning, encode_guarded

require_comfyui()
OLDER = "this ComfyUI is older than dynamic memory"
pytest.importorskip("comfy.memory_management", reason=OLDER)
control: Any = pytest.importorskip("comfy_aimdo.control", reason=OLDER)


class Library:
    """Answers every call of the C library, and notes what is freed."""

    def __init__(self) -> None:
        self.freed: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            if name.endswith("_free"):
                self.freed.append(name)
            return 0 if name.endswith("_free") else 4096

        return function


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    from comfy_aimdo import host_buffer, model_vbar

    found = Library()
    for module in (control, host_buffer, model_vbar):
        monkeypatch.setattr(module, "lib", found)
    monkeypatch.setattr(control, "get_devctx", lambda device: 7)
    return found


def ours_of(theirs: Any, dtype: str, **settings: Any) -> Any:
    from comfy_nai_t5.clip import with_our_t5

    return with_our_t5(theirs, Settings(dtype, **settings))


def test_the_guard_frees_nothing_that_is_in_use(library: Library, tmp_path: Path) -> None:
    """Copying a module would copy its handles of memory, which is freed with the copy."""
    from comfy_aimdo.host_buffer import HostBuffer
    from comfy_aimdo.model_vbar import ModelVBAR

    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    memory = ModelVBAR(1 << 30, 0)
    pinned = {"weights": (HostBuffer(0, 0, 0), [], [-1], [0], [0], {})}
    for module in theirs.cond_stage_model.modules():
        if isinstance(module, torch.nn.Linear):
            module._v, module._pin_state = memory.alloc(4096), pinned
    dense = theirs.cond_stage_model.t5xxl.transformer.encoder.block[1].layer[1].DenseReluDense
    dense.wo.weight.data.mul_(1e5)
    ours = ours_of(theirs, "float16")
    with pytest.warns(ScaleTightenedWarning):
        assert conditioning(ours, "a cat")["cond"].isfinite().all()
    gc.collect()
    assert library.freed == []
    del ours, theirs, module, dense, memory, pinned
    gc.collect()
    assert "vbar_free" in library.freed, "what is in use no longer has to be freed"


@pytest.mark.parametrize("compiled", [False, True])
def test_that_layers_are_not_joined_is_told(compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_nai_t5.clip import describe

    ours = ours_of(stock(toy_file(tmp_path, V1_1), "mochi"), "float32", compile=compiled)
    monkeypatch.setattr(ours.patcher, "is_dynamic", lambda: True, raising=False)
    told = "separate layout: ComfyUI streams its weights (dynamic memory)"
    assert describe(ours).endswith(told + ("; not compiled, which needs every layer joined" if compiled else ""))


# Seven products, two norms, which are ComfyUI's modules, of seven operations and a cast after it, attention, two sums,
# and three for the gated activation.
LAUNCHES_PER_LAYER = 29


def put_into_dynamic_memory(stack: Any, device: PretendedCuda) -> None:
    """Weights as ComfyUI holds them: on the CPU, with pages on the card; norms, not streamed, on the card."""
    for module in list(stack.modules()):
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if not hasattr(module, "comfy_cast_weights"):
            device.put(module)
            continue
        with device.fakes:
            module._v_weight = torch.empty(weight.shape, dtype=torch.float16, device=CUDA)
        module._v_bias, module._v, module._v_signature = None, 7, 7
    stack.device = CUDA


def test_what_an_encode_asks_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all pages on the card nothing is copied but the ids, and nothing is waited for but the check."""
    from comfy_aimdo import model_vbar

    freed: list[int] = []
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(model_vbar, "vbar_fault", lambda memory: memory)
    monkeypatch.setattr(model_vbar, "vbar_signature_compare", lambda one, other: one == other)
    monkeypatch.setattr(model_vbar, "vbar_unpin", freed.append)
    launches = []
    for layers in (1, 3):
        config = V1_1.model_copy(update={"num_layers": layers})
        ours = ours_of(stock(toy_file(tmp_path / str(layers), config), "mochi"), "float16")
        stack = ours.cond_stage_model.t5xxl.transformer.stack
        with torch.no_grad(), PretendedCuda() as device:
            put_into_dynamic_memory(stack, device)
            for _ in range(2):
                device.reset()
                encode_guarded(stack, torch.ones(1, 64, dtype=torch.long))
        launches.append(device.launches.total())
        assert dict(device.copies) == {("cpu", "cuda"): 1}
        assert dict(device.waits) == {"_local_scalar_dense": 1}
        assert device.float32_products == 0
    assert (launches[1] - launches[0]) / 2 <= LAUNCHES_PER_LAYER
    assert freed, "no page was taken from dynamic memory"
