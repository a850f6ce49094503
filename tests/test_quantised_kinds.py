"""Every kind of quantised weight gives the numbers of the library that it comes from, to the bit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nai_t5_core.backends.quantised.four_bits import LARGEST, FourBits
from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.backends.quantised.kinds import Kind, Plain, QuantisedWeight
from nai_t5_core.backends.quantised.scaled import MXFP8, NVFP4, Scaled, is_power_of_4, rotation, tiled_shape

ROWS, COLUMNS = 37, 512
FLOAT8 = torch.float8_e4m3fn


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def some_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def assert_same_bits(found: Tensor, meant: Tensor) -> None:
    assert found.dtype == meant.dtype == torch.float32 and found.shape == meant.shape
    same = (found.view(torch.int32) == meant.view(torch.int32)) | (found.isnan() & meant.isnan())
    assert bool(same.all())


def assert_rows_are_rows(kind: Kind, parts: dict[str, Tensor], whole: Tensor) -> None:
    """Runs of rows, and rows by their numbers, are those of the whole weight, and belong to who asked for them."""
    numbers = torch.tensor([5, 0, 5, len(whole) - 1])
    whole = whole.clone()
    for rows in (slice(3, 11), numbers):
        kind.unpack(parts, rows).fill_(3)
    assert_same_bits(kind.unpack(parts, slice(3, 11)), whole[3:11])
    assert_same_bits(kind.unpack(parts, numbers), whole[numbers])
    assert_same_bits(QuantisedWeight(kind, (len(whole), whole.shape[1]), parts).plain(), whole)


@pytest.mark.parametrize("kind", GGML_KINDS.values(), ids=GGML_KINDS.keys())
def test_blocks_of_ggml(kind: Any) -> None:
    """Blocks of any bytes: scales from zero to the largest, subnormal, infinite and no numbers among them."""
    gguf = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind.name]
    assert gguf.GGML_QUANT_SIZES[number] == (kind.block, kind.size)
    blocks = some_bytes(ROWS * COLUMNS // kind.block, kind.size)
    extremes = torch.tensor([0.0, -0.0, 65504.0, -65504.0, 6e-8, math.inf, math.nan, 1.0]).half()
    for start in kind.halves:
        blocks[:8, start : start + 2] = extremes.view(torch.uint8).reshape(8, 2)
    parts = {"weight": blocks.reshape(ROWS, -1)}
    with np.errstate(all="ignore"):
        meant = torch.from_numpy(gguf.quants.dequantize(parts["weight"].numpy(), number))
    assert_same_bits(kind.unpack(parts, slice(0, ROWS)), meant)
    assert_rows_are_rows(kind, parts, meant)
    assert not all(bool(scale.isfinite().all()) for _, scale in kind.scales(parts))
    blocks[:, :] = 0
    assert all(bool(scale.isfinite().all()) for _, scale in kind.scales(parts))


# One block of each kind: the bytes, the first two numbers and the last. What they are was taken from ggml's layout.
KNOWN = {
    "Q8_0": (bytes([0, 0x3C, 1, 0x80]) + bytes(29) + b"\xff", (1.0, -128.0, -1.0)),
    "Q4_0": (bytes([0, 0x3C, 0xF0]) + bytes(14) + b"\x9f", (-8.0, -8.0, 1.0)),
    "Q4_1": (bytes([0, 0x3C, 0, 0x40, 0xF0]) + bytes(14) + b"\x9f", (2.0, 2.0, 11.0)),
    "IQ4_NL": (bytes([0, 0x3C, 0xF0]) + bytes(14) + b"\x9f", (-127.0, -127.0, 13.0)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_block(name: str) -> None:
    content, (first, second, last) = KNOWN[name]
    kind = GGML_KINDS[name]
    assert len(content) == kind.size
    values = kind.unpack({"weight": torch.tensor(list(content), dtype=torch.uint8)[None]}, slice(0, 1))[0]
    assert (values[0], values[1], values[-1]) == (first, second, last)


SCALES = {
    "weight": (lambda rows, columns: torch.tensor(0.37), None),
    "weight, in a list": (lambda rows, columns: torch.tensor([0.37]), None),
    "row": (lambda rows, columns: noise(rows).abs() + 0.1, None),
    "row, as a column": (lambda rows, columns: noise(rows, 1).abs() + 0.1, None),
    "block": (lambda rows, columns: noise(-(-rows // 16), columns // 128), (16, 128)),
}


@pytest.mark.parametrize("shape", SCALES)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_one_byte_with_scales(dtype: torch.dtype, shape: str) -> None:
    make, block = SCALES[shape]
    scale = make(ROWS, COLUMNS)
    values = (noise(ROWS, COLUMNS) * 40).to(dtype)
    kind = Scaled("any", dtype, block)
    whole = values.float()
    for row in range(ROWS):
        for column in range(0, COLUMNS, 128):
            one = scale[row // 16, column // 128] if block else scale.reshape(-1)[row if scale.numel() > 1 else 0]
            whole[row, column : column + 128] *= one
    parts = {"weight": values, "weight_scale": scale}
    assert kind.fault({name: (tuple(part.shape), part.dtype) for name, part in parts.items()}, (ROWS, COLUMNS)) is None
    assert_rows_are_rows(kind, parts, whole)


def test_plain_numbers() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        values = noise(ROWS, COLUMNS).to(dtype)
        assert_rows_are_rows(Plain(dtype), {"weight": values}, values.float())
    values = noise(ROWS, COLUMNS).to(FLOAT8)
    assert_rows_are_rows(Scaled("float8", FLOAT8), {"weight": values}, values.float())


# ---------------------------------------------------------------------------------------------------------------------
# ComfyUI's, by the package that it quantises with
# ---------------------------------------------------------------------------------------------------------------------


def in_tiles(scale: Tensor) -> Tensor:
    """Scales [rows, blocks] as they lie in ComfyUI's files, place by place."""
    tiled = torch.zeros(tiled_shape(*scale.shape), dtype=scale.dtype)
    flat, across = tiled.view(-1), tiled.shape[1] // 4
    for row in range(scale.shape[0]):
        for block in range(scale.shape[1]):
            tile = (row // 128) * across + block // 4
            flat[tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4] = scale[row, block]
    return tiled


def test_nvfp4_by_hand() -> None:
    codes = some_bytes(150, COLUMNS) & 15
    scale = (noise(150, COLUMNS // 16).abs() * 10).to(FLOAT8)
    parts = {
        "weight": codes[:, ::2] << 4 | codes[:, 1::2],
        "weight_scale": in_tiles(scale.view(torch.uint8)),
        "weight_scale_2": torch.tensor(0.003),
    }
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = magnitudes[(codes & 7).int()] * torch.where(codes >= 8, -1.0, 1.0)
    whole = values * (0.003 * scale.float()).repeat_interleave(16, dim=1)
    assert_rows_are_rows(NVFP4(), parts, whole)


def test_mxfp8_by_hand() -> None:
    values = (noise(150, COLUMNS) * 100).to(FLOAT8)
    exponents = some_bytes(150, COLUMNS // 32) % 40 + 107
    parts = {"weight": values, "weight_scale": in_tiles(exponents)}
    whole = values.float() * (2.0 ** (exponents.float() - 127)).repeat_interleave(32, dim=1)
    assert_rows_are_rows(MXFP8(), parts, whole)


def test_a_rotation_is_undone() -> None:
    """The matrix of 16 is that of 4 by itself in each place of that of 4; applied twice, it changes nothing."""
    small = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    matrix = rotation(16, torch.device("cpu"))
    assert torch.equal(matrix[4:8, 12:16], small[1, 3] * small)
    assert torch.equal(matrix @ matrix, torch.eye(16))
    weight = noise(ROWS, COLUMNS)
    turned = (weight.reshape(ROWS, -1, 16) @ matrix.T).reshape(ROWS, COLUMNS)
    scale = turned.abs().amax(1) / 127
    parts = {"weight": (turned / scale[:, None]).round().to(torch.int8), "weight_scale": scale}
    found = Scaled("int8, rotated", torch.int8, turned=16).unpack(parts, slice(0, ROWS))
    assert float((found - weight).abs().max()) < 0.1
    # The whole numbers are turned back exactly, and each is rounded once.
    exact = (parts["weight"].double().reshape(ROWS, -1, 16) @ matrix.double().T).reshape(ROWS, COLUMNS)
    assert torch.equal(found, (exact * scale.double()[:, None]).float())
    with pytest.raises(ValueError, match="before the scales of rows, and not of blocks"):
        Scaled("both", torch.int8, (128, 128), turned=16)
    assert [number for number in range(300) if is_power_of_4(number)] == [4, 16, 64, 256]


BY_ROWS = {"per_channel": True}
TURNED = {**BY_ROWS, "convrot": True, "convrot_groupsize": 16}
COMFYUI: dict[str, tuple[Kind, str, dict[str, Any]]] = {
    "NVFP4": (NVFP4(), "TensorCoreNVFP4Layout", {}),
    "MXFP8": (MXFP8(), "TensorCoreMXFP8Layout", {}),
    "int8": (Scaled("int8", torch.int8), "TensorWiseINT8Layout", {}),
    "int8 by rows": (Scaled("int8", torch.int8), "TensorWiseINT8Layout", BY_ROWS),
    "int8, rotated": (Scaled("int8", torch.int8, turned=16), "TensorWiseINT8Layout", TURNED),
    "float8": (Scaled("float8", FLOAT8), "TensorCoreFP8Layout", {}),
}


@pytest.mark.parametrize("shape", [(128, 64), (160, 256), (96, 4096)])
@pytest.mark.parametrize("name", COMFYUI)
def test_kinds_of_comfyui_by_its_package(name: str, shape: tuple[int, int]) -> None:
    kitchen = pytest.importorskip("comfy_kitchen.tensor", reason="ComfyUI's package for quantised weights")
    kind, layout_name, options = COMFYUI[name]
    layout = getattr(kitchen, layout_name)
    values, params = layout.quantize(noise(*shape), **options)
    parts = {f"weight{end}": part for end, part in layout.state_dict_tensors(values, params).items()}
    assert kind.fault({part: (tuple(held.shape), held.dtype) for part, held in parts.items()}, shape) is None
    found = kind.unpack(parts, slice(0, shape[0]))
    if name == "int8, rotated":  # a product of matrices, whose sums have no order
        torch.testing.assert_close(found, layout.dequantize(values, params), rtol=0, atol=1e-6)
    else:
        assert_same_bits(found, layout.dequantize(values, params))


# ---------------------------------------------------------------------------------------------------------------------
# bitsandbytes'
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64, 128])
def test_four_bits_by_hand(block: int, nested: bool) -> None:
    codes = some_bytes(ROWS, COLUMNS) & 15
    table, inner_table = torch.linspace(-1, 1, 16) ** 3, torch.linspace(-1, 1, 256) ** 3
    count = ROWS * COLUMNS // block
    largest = noise(count).abs() + 0.01
    kind = FourBits("NF4", block)
    parts = {"weight": (codes.view(-1)[::2] << 4 | codes.view(-1)[1::2])[:, None], "quant_map": table}
    if nested:
        inner, outer = some_bytes(count), noise(-(-count // 32)).abs()
        largest = inner_table[inner.int()] * outer.repeat_interleave(32)[:count] + 0.25
        parts |= {"absmax": inner, "nested_absmax": outer, "nested_quant_map": inner_table}
        kind = replace(kind, nested_block=32, offset=0.25)
    else:
        parts["absmax"] = largest
    assert kind.fault({name: (tuple(part.shape), part.dtype) for name, part in parts.items()}, (ROWS, COLUMNS)) is None
    whole = (table[codes.int()].reshape(-1, block) * largest[:, None]).reshape(ROWS, COLUMNS)
    assert_rows_are_rows(kind, FourBits.arranged(parts, ROWS), whole)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bits_by_bitsandbytes(name: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="the library that these kinds come from")
    weight = noise(ROWS * 8, COLUMNS)
    packed, state = functional.quantize_4bit(weight, compress_statistics=nested, quant_type=name)
    content = state.as_dict()
    parts = {"weight": packed, **{key: part for key, part in content.items() if isinstance(part, Tensor)}}
    kind = FourBits(name, content["blocksize"], content.get("nested_blocksize", 0), content.get("nested_offset", 0.0))
    assert (parts[LARGEST].dtype == torch.uint8) == nested
    meant = functional.dequantize_4bit(packed, state)
    assert_rows_are_rows(kind, FourBits.arranged(parts, ROWS * 8), meant)


def test_eight_bits_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="the library that these kinds come from")
    values, statistics, _ = functional.int8_vectorwise_quant(noise(ROWS, COLUMNS).half())
    kind = Scaled("int8 of bitsandbytes", torch.int8, unit=1 / 127)
    parts = {"weight": values, "weight_scale": statistics}
    assert_rows_are_rows(kind, parts, functional.int8_vectorwise_dequant(values, statistics))
