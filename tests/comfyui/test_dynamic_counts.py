"""What an encode in ComfyUI's dynamic memory asks of a card that is pretended, with all pages there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_file
from comfy_toys import PILE, UMT5, V1_0, V1_1, stock, toy_state
from dynamic_memory import require_dynamic_memory
from pretended_cuda import CUDA, PretendedCuda

from comfy_nai_t5.choices import Settings
from nai_t5_core.facts.config import T5Config
from nai_t5_core.float16.guard import encode_guarded

require_dynamic_memory()

_LARGER = {"d_model": 128, "d_kv": 32, "d_ff": 192}
KINDS = {
    "v1.1": V1_1.model_copy(update=_LARGER),
    "v1.0": V1_0.model_copy(update=_LARGER),
    "umt5": UMT5.model_copy(update=_LARGER),
    "pile": PILE.model_copy(update=_LARGER),
}
# Of one layer, of a float16 file. By torch: four products, two norms with the casts of their weights and results,
# attention, two sums, and three for the gated activation or one for ReLU. Where each layer has a bias of its own, it is
# cast, and spread over the distances.
BY_TORCH = {"v1.1": 16, "v1.0": 14, "umt5": 24, "pile": 24}
# By the kernels: four products, two norms, gate, attention, and the sum after the feed-forward. Biases that layers have
# of their own are made ready in one operation for all.
BY_KERNELS = 9
# Seven products, two norms, which are ComfyUI's modules, of seven operations and a cast after it, attention, two sums,
# and three for the gated activation.
SEPARATE = 29


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr("comfy_nai_t5.stack.refuses_cuda_layers", lambda *_: "not in this test")
    return PretendedCuda()


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch, device: PretendedCuda) -> Counter[str]:
    """How often pages are asked for, and given back."""
    import comfy_aimdo.torch
    from comfy_aimdo import model_vbar

    counted: Counter[str] = Counter()

    def fault(place: Any) -> int:
        counted["fault"] += 1
        return 7

    def at(place: Any, _: Any) -> torch.Tensor:
        with device.fakes:
            return torch.empty(place[2], dtype=torch.uint8, device=CUDA)

    monkeypatch.setattr(model_vbar, "vbar_fault", fault)
    monkeypatch.setattr(model_vbar, "vbar_signature_compare", lambda one, other: one == other)
    monkeypatch.setattr(model_vbar, "vbar_unpin", lambda _: counted.update(["unpin"]))
    monkeypatch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", at)
    return counted


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, device: PretendedCuda) -> None:
    """The kernels for CUDA, each a launch and a result without values."""
    pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")
    from comfy_nai_t5 import cuda_layer

    def add_norm(residual: Any, delta: Any, inv_scale: float, epsilon: float, dtype: Any, weight: Any, **_: Any) -> Any:
        device.launches["add_norm"] += 1
        assert residual.dtype == torch.float32 and residual.is_contiguous()
        assert weight.device == CUDA and (delta is None or delta.dtype == dtype)
        return torch.empty_like(residual, dtype=dtype)

    def attend(qkv: Any, bias: Any, documents: Any, scale: float) -> Any:
        device.launches["attend"] += 1
        assert bias.is_contiguous() and documents.table.device == CUDA
        return qkv.new_empty(len(qkv), qkv.shape[1] // 3)

    def gate(joined: Any, activation: str, is_gated: bool, factor: float) -> Any:
        device.launches["gate"] += 1
        return joined.new_empty(len(joined), joined.shape[1] // (2 if is_gated else 1))

    for function in (add_norm, attend, gate):
        monkeypatch.setattr(cuda_layer, function.__name__, function)
    monkeypatch.setattr("comfy_nai_t5.stack.refuses_cuda_layers", lambda *_: None)
    # The mode that counts is not to be a reason for torch's own operations.
    monkeypatch.setattr("comfy_nai_t5.stack.torch_is_needed", lambda: False)


def put_into_dynamic_memory(stack: Any, device: PretendedCuda) -> None:
    """Weights as ComfyUI holds them: on the CPU, with pages on the card; norms and small tables on the card."""
    address = 0
    linears = [module for group in stack.groups_to_be_joined for module in group]
    rest = [module for module in stack.modules() if module._parameters.get("weight") is not None]
    for module in [*linears, *(each for each in rest if not any(each is linear for linear in linears))]:
        weight = module.weight
        if not hasattr(module, "comfy_cast_weights") or weight.nbytes <= 16 * 1024:
            device.put(module)
            continue
        with device.fakes:
            module._v_weight = torch.empty(weight.shape, dtype=torch.float16, device=CUDA)
        module.weight_comfy_model_dtype = torch.float16
        size = 2 * weight.numel()
        module._v_bias, module._v, module._v_signature = None, ("memory", address, size), 7
        address += size
    stack.device = CUDA


Encode = Callable[[T5Config, str], tuple[float, float]]


@pytest.fixture
def per_layer(device: PretendedCuda, faults: Counter[str], tmp_path: Path) -> Encode:
    """Launches and requests for pages of a layer, in an encode after others; all else is of the call."""
    from comfy_nai_t5.clip import t5_models, with_our_t5

    def encoded(config: T5Config, layout: str) -> tuple[float, float]:
        launches, asked = [], []
        for layers in (2, 6):
            config = config.model_copy(update={"num_layers": layers})
            family = "wan" if config.vocab_size == 4096 else "auraflow" if config.bias_per_layer else "mochi"
            family = family if config.gated else "cosmos"
            state = {name: x.half() if x.is_floating_point() else x for name, x in toy_state(config).items()}
            theirs = stock(write_file(tmp_path / f"{layers}.safetensors", state), family)
            ours = with_our_t5(theirs, Settings("float16", layout=layout))
            (owner,) = t5_models(ours.cond_stage_model).values()
            stack = owner.transformer.stack
            with torch.no_grad(), device:
                put_into_dynamic_memory(stack, device)
                for _ in range(3):
                    device.reset()
                    faults.clear()
                    encode_guarded(stack, torch.ones(1, 64, dtype=torch.long))
                    assert faults["unpin"] == faults["fault"]
            launches.append(device.launches.total())
            asked.append(faults["fault"])
            assert dict(device.waits) == {"_local_scalar_dense": 1}
            assert device.float32_products == 0
        return (launches[1] - launches[0]) / 4, (asked[1] - asked[0]) / 4

    return encoded


@pytest.mark.parametrize("kind", KINDS)
def test_by_torch(kind: str, per_layer: Encode, device: PretendedCuda) -> None:
    launches, faults = per_layer(KINDS[kind], "fused")
    assert (launches <= BY_TORCH[kind], faults) == (True, 4), device.launches
    assert dict(device.copies) == {("cpu", "cuda"): 1}


@pytest.mark.parametrize("kind", KINDS)
def test_by_the_kernels(kind: str, kernels: None, per_layer: Encode, device: PretendedCuda) -> None:
    launches, faults = per_layer(KINDS[kind], "fused")
    assert (launches <= BY_KERNELS, faults) == (True, 4), device.launches
    # The ids, and the table of the documents.
    assert dict(device.copies) == {("cpu", "cuda"): 2}


def test_module_by_module(per_layer: Encode) -> None:
    launches, faults = per_layer(KINDS["v1.1"], "separate")
    assert (launches <= SEPARATE, faults) == (True, 7)
