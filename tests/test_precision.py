"""Which dtype and device ``"auto"`` comes to, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nai_t5_core import load_encoder, load_t5
from nai_t5_core.backends import auto_dtype
from nai_t5_core.backends.auto_dtype import resolve_dtype
from nai_t5_core.backends.choose import prepack, why_not_prepack
from nai_t5_core.backends.kernels import build
from nai_t5_core.backends.kernels.build import missing_for
from nai_t5_core.backends.kernels.sets import AVX2
from nai_t5_core.model.precision import is_finite, largest_absolute, resolve_device

IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(3))
needs_avx2 = pytest.mark.skipif(missing_for(AVX2) is not None, reason=str(missing_for(AVX2)))


def processor(monkeypatch: pytest.MonkeyPatch, native: bool, *flags: str) -> None:
    """Has torch and us see a processor with or without native bfloat16, and what Linux tells of it."""
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: native, raising=False)
    monkeypatch.setattr(build, "_processor_flags", lambda: frozenset(flags))


@pytest.mark.parametrize("native", [True, False])
def test_auto_dtype_by_device(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, native)
    assert resolve_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if native else torch.float32)
    assert resolve_dtype("auto", torch.device("cuda", 1)) == torch.float16
    assert resolve_dtype("auto", torch.device("mps")) == torch.float16


@pytest.mark.parametrize("capability", [(6, 1), (7, 5), (9, 0)])
def test_auto_dtype_on_any_card(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards without fast float16 have no fast bfloat16 either, and float32 takes twice the memory."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: capability >= (8, 0))
    assert resolve_dtype("auto", torch.device("cuda")) == torch.float16


@needs_avx2
def test_weights_in_16_bits_are_computed_in_float32(
    v1_1_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a processor that multiplies none: the encoder alone, which says so, and whose results are those of float32."""
    processor(monkeypatch, False, *AVX2.needs)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    auto_dtype._tell.cache_clear()
    with caplog.at_level("INFO"):
        encoder = load_encoder(v1_1_folder, device="cpu")
    assert encoder.dtype == torch.bfloat16 and encoder.describe_attention() == "auto: kernels"
    assert "the encoder's weights stay in it, at half the memory of float32, and our kernels compute" in caplog.text
    with torch.no_grad():
        in_place = encoder(IDS)
        assert why_not_prepack(encoder) is None
        prepack(encoder)
        assert all(torch.equal(encoder(IDS), in_place) for _ in range(3))
    assert {block.runner.name for block in encoder.encoder.block} == {"AVX2 kernels, in float32, in panels"}
    exact = load_encoder(v1_1_folder, "float64", "cpu")
    exact.load_state_dict({name: tensor.double() for name, tensor in encoder.state_dict().items()})
    # The result alone is rounded.
    expected = exact(IDS)
    assert float((in_place.double() - expected).abs().max()) < 2.0**-8 * float(expected.abs().max())
    assert resolve_dtype("auto", torch.device("cpu"), has_decoder=True) == torch.float32
    assert load_t5(v1_1_folder, device="cpu").dtype == torch.float32


@needs_avx2
@pytest.mark.parametrize("flags", [{"avx512f"}, {"amx_bf16"}])
def test_float32_stays_where_onednn_has_something_better(flags: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, False, *AVX2.needs, *flags)
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32


def test_named_dtypes() -> None:
    cuda = torch.device("cuda")
    assert resolve_dtype("bfloat16", cuda) == resolve_dtype(torch.bfloat16, cuda) == torch.bfloat16
    with pytest.raises(ValueError, match=r"unknown dtype 'int8'; allowed: auto, float64, float32, bfloat16, float16"):
        resolve_dtype("int8", cuda)


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("meta")) == torch.device("meta")
    with pytest.raises(ValueError, match=r"device 'sofa' cannot be used here .*; try 'auto' or 'cpu'"):
        resolve_device("sofa")


def test_values_beyond_a_dtype_are_seen() -> None:
    assert largest_absolute(torch.tensor([1.0, -3.0])) == 3
    assert is_finite(torch.tensor([1.0], dtype=torch.float16))
    for bad in (torch.inf, -torch.inf, torch.nan):
        assert not is_finite(torch.tensor([1.0, bad], dtype=torch.float16))
