"""Quantised weights of every kind that our CPU kernels read: any bytes, with scales of every sort."""

from __future__ import annotations

import torch
from torch import Tensor

from nai_t5_core.backends.kernels.pieces import TURNED
from nai_t5_core.backends.quantised.four_bits import LARGEST, NESTED_LARGEST, NESTED_TABLE, TABLE, FourBits
from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.backends.quantised.kinds import WEIGHT, Plain, QuantisedWeight
from nai_t5_core.backends.quantised.scaled import MXFP8, NVFP4, SCALE, SCALE_2, Scaled, rotation, tiled_shape

ROWS, DEPTH = 37, 512


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blocks(name: str, rows: int = ROWS, depth: int = DEPTH) -> QuantisedWeight:
    """Any bytes, with scales that are numbers of either sign, zero and the smallest one among them."""
    kind = GGML_KINDS[name]
    content = torch.randint(0, 256, (rows * depth // kind.block, kind.size), dtype=torch.uint8, generator=generator())
    for seed, start in enumerate(kind.halves):
        scales = (torch.randn(len(content), generator=generator(seed)) * 0.1).half()
        scales[:3] = torch.tensor([0.0, -0.0, 6e-8]).half()
        content[:, start : start + 2] = scales[:, None].view(torch.uint8)
    return QuantisedWeight(kind, (rows, depth), {WEIGHT: content.reshape(rows, -1)})


def every_byte(dtype: torch.dtype, rows: int = ROWS, depth: int = DEPTH) -> Tensor:
    """Every one there is, but those that are no numbers."""
    values = torch.arange(rows * depth).to(torch.uint8).view(dtype).reshape(rows, depth)
    return values.float().nan_to_num(0.5, 2, -2).to(dtype) if dtype.is_floating_point else values


def scaled(dtype: torch.dtype, scale: Tensor | None, unit: float = 1.0) -> QuantisedWeight:
    values = every_byte(dtype)
    parts = {WEIGHT: values} if scale is None else {WEIGHT: values, SCALE: scale}
    return QuantisedWeight(Scaled("any", dtype, unit=unit), (ROWS, DEPTH), parts)


def turned(group: int, rows: int = ROWS, depth: int = DEPTH, scale: Tensor | None = None) -> QuantisedWeight:
    """Rotated before it was rounded, with the largest and the smallest sums that there are."""
    values = torch.randint(-128, 128, (rows, depth), dtype=torch.int8, generator=generator(13))
    signs = rotation(group, torch.device("cpu")).sign().repeat(-(-rows // group), depth // group)[:rows]
    values[::2] = torch.where(signs > 0, 127, -128)[::2]
    values[1::4] = torch.where(signs > 0, -128, 127)[1::4]
    scale = torch.rand(rows, 1, generator=generator(3)) + 0.1 if scale is None else scale
    return QuantisedWeight(Scaled("any", torch.int8, turned=group), (rows, depth), {WEIGHT: values, SCALE: scale})


def of_rows() -> Tensor:
    return torch.rand(ROWS, 1, generator=generator(3)) + 0.1


def four_bits(
    rows: int, depth: int, block: int, nested: int = 0, dtype: torch.dtype = torch.float32
) -> QuantisedWeight:
    """Largest values of either sign, which products and sums round."""
    drawn, count = generator(8), rows * depth // block
    parts = {
        WEIGHT: torch.randint(0, 256, (rows, depth // 2), dtype=torch.uint8, generator=drawn),
        TABLE: torch.randn(16, generator=drawn).to(dtype),
    }
    if nested:
        parts[LARGEST] = torch.randint(0, 256, (rows, depth // block), dtype=torch.uint8, generator=drawn)
        parts[NESTED_TABLE] = torch.randn(256, generator=drawn).to(dtype)
        parts[NESTED_LARGEST] = torch.randn(-(-count // nested), generator=drawn).to(dtype)
    else:
        parts[LARGEST] = torch.randn(rows, depth // block, generator=drawn).to(dtype)
    return QuantisedWeight(FourBits("4 bits", block, nested, 0.0719 if nested else 0.0), (rows, depth), parts)


def nvfp4(rows: int, depth: int) -> QuantisedWeight:
    """Every scale that is a number."""
    values = torch.randint(0, 256, (rows, depth // 2), dtype=torch.uint8, generator=generator(9))
    scale = every_byte(torch.float8_e4m3fn, *tiled_shape(rows, depth // 16))
    return QuantisedWeight(NVFP4(), (rows, depth), {WEIGHT: values, SCALE: scale, SCALE_2: torch.tensor(0.0123)})


def mxfp8(rows: int, depth: int, least: int = 27) -> QuantisedWeight:
    """Zero, and powers from 2^-100 to 2^100: the instructions for bfloat16 have no numbers below 2^-126."""
    values = every_byte(torch.float8_e4m3fn, rows, depth)
    powers = torch.randint(least, 228, tiled_shape(rows, depth // 32), dtype=torch.uint8, generator=generator(10))
    powers.view(-1)[:3] = torch.tensor([0, least, 227], dtype=torch.uint8)
    return QuantisedWeight(MXFP8(), (rows, depth), {WEIGHT: values, SCALE: powers})


def in_blocks(rows: int, depth: int, dtype: torch.dtype, block: tuple[int, int] = (128, 128)) -> QuantisedWeight:
    scale = torch.randn(-(-rows // block[0]), -(-depth // block[1]), generator=generator(11))
    parts = {WEIGHT: every_byte(dtype, rows, depth), SCALE: scale}
    return QuantisedWeight(Scaled("any", dtype, block), (rows, depth), parts)


def beside(rows: int = ROWS, depth: int = DEPTH) -> dict[str, QuantisedWeight]:
    """Kinds whose scales lie beside their numbers."""
    found = {
        "NF4": four_bits(rows, depth, 64),
        "NF4, nested": four_bits(rows, depth, 64, 256),
        "NVFP4": nvfp4(rows, depth),
        "MXFP8": mxfp8(rows, depth),
    }
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        found[f"{dtype}, in blocks"] = in_blocks(rows, depth, dtype)
    return found


def weights() -> dict[str, QuantisedWeight]:
    found = {name: blocks(name) for name in GGML_KINDS}
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
        found[f"{dtype}, by rows"] = scaled(dtype, of_rows())
        found[f"{dtype}, by weight"] = scaled(dtype, torch.tensor(0.37, dtype=torch.float64))
    found["float8, without a scale"] = scaled(torch.float8_e4m3fn, None)
    found["int8 of bitsandbytes"] = scaled(torch.int8, of_rows()[:, 0], 1 / 127)
    for group in TURNED:
        found[f"rotated in groups of {group}"] = turned(group)
    found["rotated, by weight"] = turned(16, scale=torch.tensor(-0.37))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        numbers = torch.randn(ROWS, DEPTH, generator=generator(4)).to(dtype)
        found[str(dtype)] = QuantisedWeight(Plain(dtype), (ROWS, DEPTH), {WEIGHT: numbers})
    return found | beside()
