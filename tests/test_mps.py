"""Apple's GPUs, pretended: float16 with scales is computed by torch; what Metal lacks is refused before any work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from cuda_toys import stack_of
from pretended_cuda import PretendedCuda
from torch import Tensor
from toy_quantised import float8_by_rows, float8_in_blocks, float8_plain, int8_with_scales, quantised, write_quantised

from nai_t5_core.backends import mps
from nai_t5_core.backends.auto_dtype import resolve_dtype
from nai_t5_core.backends.choose import encode_on_cuda, run_in_place
from nai_t5_core.bench.doctor import numbers
from nai_t5_core.facts.scales import LayerScales, StackScales
from nai_t5_core.float16.guard import guard
from nai_t5_core.model.encoder import LAYOUTS, Layout
from nai_t5_core.model.packing import PADDING_POLICIES, PaddingPolicy
from nai_t5_core.prompts import choices, text_encoder
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.weights import chosen
from nai_t5_core.weights.examine import examine
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.load import assemble

MPS = torch.device("mps", 0)
CONFIG = TOY_CONFIGS["v1.1"].encoder_only()
SCALES = StackScales((LayerScales(1, 0.5, 0.25), LayerScales(0.5, 0.25, 1), LayerScales(0.125, 0.5, 0.5)), 0.5)
LACKING = (torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


class PretendedMps(PretendedCuda):
    """As Metal, it has neither float64 nor float8."""

    def __init__(self) -> None:
        super().__init__(MPS)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(operation, types, args, kwargs)
        if isinstance(result, Tensor) and result.device.type == "mps" and result.dtype in LACKING:
            raise TypeError(f"a tensor of Apple's in {result.dtype}")
        return result


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedMps]:
    with torch.no_grad(), PretendedMps() as pretended:
        yield pretended


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", PADDING_POLICIES)
@pytest.mark.parametrize("kind", ["v1.1", "v1.0", "umt5"])
def test_float16_with_scales_runs_by_torch(
    device: PretendedMps, layout: Layout, padding: PaddingPolicy, kind: str
) -> None:
    config = TOY_CONFIGS[kind].encoder_only()
    made = stack_of(config, scales=SCALES, device="cpu")
    if layout == "separate":
        made = build_stack(config, random_state(config), torch.float16, layout)
    stack: Any = encode_on_cuda(device.put(run_in_place(made)))
    stack.guard = guard
    assert stack.runner is None and stack.describe_attention() == "auto: sdpa"
    mask = padding_mask([5, 9, 0], 12)
    hidden = stack(torch.ones(3, 12, dtype=torch.long), mask, padding=padding)
    assert hidden.device.type == "mps" and hidden.dtype == torch.float16
    assert device.launches["attention"] >= config.num_layers
    assert device.float32_products == 0


def test_what_metal_lacks_is_seen(device: PretendedMps) -> None:
    for dtype in LACKING:
        with pytest.raises(TypeError, match="Apple"):
            torch.ones(3).to(dtype).to(MPS)


@pytest.mark.parametrize(
    ("dtype", "macos", "message"),
    [
        ("float64", 15, "dtype 'float64' cannot be used on mps:0: Metal has no float64; use float32, or device='cpu'"),
        ("bfloat16", 13, "Metal has bfloat16 from macOS 14 on; use float16"),
        ("bfloat16", 14, None),
        ("float16", 13, None),
        ("float32", 13, None),
        ("auto", 13, None),
    ],
)
def test_dtypes(dtype: str, macos: int, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (macos, 0) >= (major, minor))
    if message is None:
        assert resolve_dtype(dtype, MPS) == (torch.float16 if dtype == "auto" else getattr(torch, dtype))
        return
    with pytest.raises(ValueError, match=message):
        resolve_dtype(dtype, MPS)
    assert mps.missing_on_mps(torch.device("cpu"), getattr(torch, dtype)) is None


def test_the_doctor_asks_for_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for newer, expected in ((True, asked[:3]), (False, (torch.float32, torch.float16))):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_, newer=newer: newer)
        assert numbers._computed_on(MPS, *asked) == list(expected)
    assert numbers._computed_on(torch.device("cpu"), *asked) == list(asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float64"}, "Metal has no float64"),
        ({"attention": "flex"}, "flex.*mps"),
        ({"quantize": "int8"}, "int8"),
        ({"compile": True}, "compile=True is for cpu and cuda, and the device is mps:0; leave it out"),
        ({"compile": "reduce-overhead"}, "compile='reduce-overhead' is for cpu and cuda"),
        ({"products": "onednn"}, "products='onednn'"),
    ],
)
def test_what_is_asked_for_in_vain_is_refused_before_a_weight_is_read(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (choices, chosen, text_encoder):
        monkeypatch.setattr(module, "resolve_device", lambda _: MPS)
    monkeypatch.setattr("nai_t5_core.weights.load.assemble", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        TextEncoder.from_pretrained(device="mps", **arguments)


@pytest.mark.parametrize("kind", [float8_plain, float8_by_rows, float8_in_blocks])
def test_float8_weights_stay_off_it_unless_they_are_unpacked(kind: Any, tmp_path: Path, device: PretendedMps) -> None:
    path = write_quantised(tmp_path / "t5.safetensors", quantised(random_state(CONFIG), kind))
    examination = examine(path)
    with pytest.raises(CheckpointError, match=r"cannot be loaded on mps:0: .*float8_e.*unpack=True"):
        assemble(examination, torch.float16, MPS)
    stack, _ = assemble(examination, torch.float16, MPS, unpack=True)
    assert stack.device.type == "mps" and stack.dtype == torch.float16


def test_int8_weights_stay_on_it(tmp_path: Path, device: PretendedMps) -> None:
    path = write_quantised(tmp_path / "t5.safetensors", quantised(random_state(CONFIG), int8_with_scales))
    stack, _ = assemble(examine(path), torch.bfloat16, MPS)
    ids = torch.ones(1, 12, dtype=torch.long)
    assert stack(ids).device.type == "mps"
