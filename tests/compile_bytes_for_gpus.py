"""Compiles the kernels for weights in 8 bits for GPUs that are not here, as compile_for_gpus.py does the others.

python tests/compile_bytes_for_gpus.py 90 [80 …]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import product as product_of
from typing import Any

from compile_for_gpus import compiled, product_constants

from nai_t5_core.backends.cuda import byte_kernels, kernels
from nai_t5_core.backends.cuda.byte_launches import rounding_block
from nai_t5_core.backends.cuda.byte_product_kernel import multiply_bytes, unpack_bytes
from nai_t5_core.backends.cuda.byte_products import byte_configurations_on
from nai_t5_core.backends.cuda.card import Card
from nai_t5_core.backends.cuda.int8_product_kernel import multiply_int8
from nai_t5_core.backends.cuda.int8_products import ESTIMATED_FOR_INT8, int8_candidates
from nai_t5_core.backends.cuda.launches import norm_warps
from nai_t5_core.backends.cuda.products import Configuration, Kind


def products(card: Card, overlaps: bool) -> Iterator[dict[str, Any]]:
    """Every configuration for int8 and Q8_0; the first of each size for float8, and for all of them in bfloat16."""
    float8 = "float8_e4m3" if card.capability >= (8, 9) else "float8_e4m3, by bits"
    wholes, blocks = ("int8", float8, "float8_e5m2"), ("int8",)
    for (kind, rows), configurations in byte_configurations_on(card).items():
        for number, configuration in enumerate(configurations):
            for half in ("*fp16", "*bf16") if number == 0 else ("*fp16",):
                for has_blocks in (False, True):
                    if has_blocks and configuration.block_depth % 32:
                        continue
                    for read in (blocks if has_blocks else wholes) if number == 0 else ("int8",):
                        how = (kind, rows, configuration, read, has_blocks, half)
                        yield product(card, overlaps, *how)


def product(
    card: Card,
    overlaps: bool,
    kind: Kind,
    rows: int,
    configuration: Configuration,
    read: str,
    has_blocks: bool,
    half: str,
) -> dict[str, Any]:
    types = {"x": half, "weight": "*i8" if read == "int8" else "*u8", "scales": "*fp32", "rows": "i32"}
    types |= {"block_scales": "*fp16" if has_blocks else "*fp32", "out": "*fp32" if kind == "summed" else half}
    constants = {
        "block_rows": rows,
        "kind": read,
        "has_blocks": has_blocks,
        **product_constants(kind, configuration),
    }
    return compiled(multiply_bytes, card, types, constants, configuration.warps, overlaps)


def products_of_int8(card: Card, overlaps: bool) -> Iterator[dict[str, Any]]:
    """Every configuration that is taken; for the card with the most shared memory, those that are tried as well."""
    for (kind, rows), taken in ESTIMATED_FOR_INT8.items():
        tried = int8_candidates(kind, rows) if card.capability == (9, 0) else ()
        for configuration in dict.fromkeys((*taken, *tried)):
            for half in ("*fp16", "*bf16") if kind != "summed" else ("*fp32",):
                types = {"x": "*i8", "row_scales": "*fp32", "weight": "*i8", "column_scales": "*fp32", "rows": "i32"}
                constants = {"block_rows": rows, **product_constants(kind, configuration)}
                yield compiled(multiply_int8, card, types | {"out": half}, constants, configuration.warps, overlaps)


def others(card: Card, half: str) -> Iterator[dict[str, Any]]:
    """What unpacks, and what lies between products in 8 bits."""
    float8 = "float8_e4m3" if card.capability >= (8, 9) else "float8_e4m3, by bits"
    for read, has_blocks in (("int8", False), ("int8", True), (float8, False), ("float8_e5m2", False)):
        types = {"weight": "*i8" if read == "int8" else "*u8", "scales": "*fp32", "out": half}
        types |= {"block_scales": "*fp16" if has_blocks else "*fp32"}
        types |= {"columns": "i32", "all_columns": "i32", "depth": "i32"}
        constants: dict[str, Any] = {"kind": read, "has_blocks": has_blocks, "block_columns": 8, "block_depth": 256}
        yield compiled(unpack_bytes, card, types, constants, 4, overlaps=False)
    possible = (False, True) if card.can_overlap else (False,)
    for out in ("*i8", "*u8"):
        types = {"x": half, "out": out, "scales": "*fp32"}
        for width in (4096, 6144, 10240, 65536):
            sizes = {"width": width, "block": (block := rounding_block(width))}
            for overlaps in possible:
                yield compiled(byte_kernels.round_rows, card, types, sizes, norm_warps(block), overlaps)
        has_scales = out == "*i8"
        types = {"joined": "*i32" if has_scales else "*bf16", "out": out, "scales": "*fp32"}
        types |= {"row_scales": "*fp32", "column_scales": "*fp32"}
        for activation in ("relu", "gelu", "gelu_new", "silu"):
            constants = {"width": 10240, "activation": activation, "is_gated": activation != "relu", "block": 1024}
            constants |= {"has_scales": has_scales}
            yield compiled(byte_kernels.gate_in_bytes, card, types, constants, 4, overlaps=False)
        sums = ("*i32" if has_scales else "*bf16", 1)
        # Of few rows those of parts of the depth, in float32.
        for (delta, parts), overlaps in product_of((("*fp32", 0), sums, ("*fp32", 2), ("*fp32", 4)), possible):
            types = {"residual": "*fp32", "delta": delta, "weight": "*fp32", "out": out, "finite": "*i32"}
            types |= {"count": "*i32", "epsilon": "fp32", "inv_scale": "fp32", "factor": "fp32"}
            types |= {"row_scales": "*fp32", "column_scales": "*fp32", "out_scales": "*fp32"}
            constants = {"width": 4096, "block": 4096, "parts": parts, "has_weight": True, "watches": False}
            constants |= {"has_scales": has_scales and parts == 1, "gives_bytes": True}
            yield compiled(kernels.add_norm, card, types, constants, norm_warps(4096), overlaps)
    types = {"sums": "*i32", "row_scales": "*fp32", "column_scales": "*fp32", "out": half}
    yield compiled(byte_kernels.number_sums, card, types, {"width": 12288, "block": 1024}, 4, overlaps=False)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        card = Card("a card", f"sm_{argument}")
        for overlaps in (False, True) if card.can_overlap else (False,):
            for found in (*products(card, overlaps), *products_of_int8(card, overlaps)):
                print(json.dumps({"capability": argument, **found}), flush=True)
        for half in ("*fp16", "*bf16"):
            for found in others(card, half):
                print(json.dumps({"capability": argument, **found}), flush=True)
