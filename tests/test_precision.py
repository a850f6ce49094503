"""Which dtype and device ``"auto"`` comes to, and what is refused."""

from __future__ import annotations

import pytest
import torch

from nai_t5_core.model.precision import is_finite, largest_absolute, resolve_device, resolve_dtype


@pytest.mark.parametrize("native", [True, False])
def test_auto_dtype_by_device(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: native, raising=False)
    assert resolve_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if native else torch.float32)
    assert resolve_dtype("auto", torch.device("cuda", 1)) == torch.float16
    assert resolve_dtype("auto", torch.device("mps")) == torch.float16


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
