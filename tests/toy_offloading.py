"""Every way in which diffusers offloads a pipeline; without a GPU, with the CPU in the accelerator's place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cpu_has_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines number the device that they offload to, and accelerate cannot take "cpu:0" for "cpu"."""
    import accelerate

    real = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **options: real(model, CPU, **options))


def offload_model(pipe: Any, device: torch.device = CPU) -> None:
    pipe.enable_model_cpu_offload(device=device)


def offload_sequentially(pipe: Any, device: torch.device = CPU) -> None:
    pipe.enable_sequential_cpu_offload(device=device)


def offload_blocks(pipe: Any, device: torch.device = CPU) -> None:
    pipe.enable_group_offload(device, CPU, offload_type="block_level", num_blocks_per_group=1)


def offload_leaves(pipe: Any, device: torch.device = CPU) -> None:
    pipe.enable_group_offload(device, CPU, offload_type="leaf_level")


OFFLOADS = [offload_model, offload_sequentially, offload_blocks, offload_leaves]


def hooks_of(model: torch.nn.Module) -> set[str]:
    """Kinds of offloading hooks anywhere in a model."""
    accelerate = {type(part._hf_hook).__name__ for part in model.modules() if hasattr(part, "_hf_hook")}
    registries: list[Any] = [part._diffusers_hook for part in model.modules() if hasattr(part, "_diffusers_hook")]
    return accelerate | {name for registry in registries for name in registry.hooks}
