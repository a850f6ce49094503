"""Compiles the kernels for GPUs that are not here, and prints what each takes of one, as lines of JSON.

python tests/compile_for_gpus.py 90 [80 gfx942 …]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import triton
from cards import AMD_CARDS, amd_usage, usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nai_t5_core.backends.cuda import kernels
from nai_t5_core.backends.cuda.attention_shapes import candidates
from nai_t5_core.backends.cuda.card import Card
from nai_t5_core.backends.cuda.card_choice import choice_for
from nai_t5_core.backends.cuda.chosen_products import configurations_on
from nai_t5_core.backends.cuda.launches import MARGIN, norm_warps
from nai_t5_core.backends.cuda.product_kernel import multiply
from nai_t5_core.backends.cuda.products import Kind
from nai_t5_core.backends.cuda.tile_kernel import multiply_tiles
from nai_t5_core.backends.cuda.tiles import tile_candidates

KINDS: tuple[Kind, ...] = ("plain", "gated", "summed")


def compiled(
    kernel: Any,
    card: Card,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    overlaps: bool,
    stages: int = 2,
) -> dict[str, Any]:
    """What a kernel takes: registers, bytes of stack and of shared memory. Pointers are on bounds of 16 bytes."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in types if types[name].startswith("*")}
    constants = constants | ({"overlaps": overlaps} if "overlaps" in names else {})
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": warps, "num_stages": stages} | ({"launch_pdl": True} if overlaps else {})
    result = triton.compile(source, target=target_of(card), options=options)
    found = amd_usage(result.asm["amdgcn"]) if card.is_amd else usage(result.asm["cubin"])
    code = result.asm.get("ptx", "")
    found |= {"waits": code.count("griddepcontrol.wait"), "starts": code.count("griddepcontrol.launch_dependents")}
    return {"kernel": kernel.__name__, **constants, "warps": warps, **found, "shared": result.metadata.shared}


def target_of(card: Card) -> GPUTarget:
    if card.is_amd:
        return GPUTarget("hip", card.architecture, AMD_CARDS[card.architecture][0])
    major, minor = card.capability
    return GPUTarget("cuda", 10 * major + minor, 32)


def all_of(card: Card, overlaps: bool) -> Iterator[dict[str, Any]]:
    """The kernels in the sizes of T5-XXL and in odd ones."""
    usual = choice_for(card).row.attention
    taken = [usual(tokens) for tokens in (16, 1024)]
    for half in ("*fp16", "*bf16"):
        for d_kv in (16, 64, 128):
            # What is tried is only tried with heads of 64.
            for shape in dict.fromkeys((*taken, *candidates(1024, card.architecture)) if d_kv == 64 else taken):
                types = {"qkv": half, "table": "*fp32", "documents": "*i32", "out": half, "scale": "fp32"}
                sizes = {"heads": 64, "d_kv": d_kv, "reach": 128, "margin": MARGIN}
                sizes |= {"query_block": shape.queries, "key_block": shape.keys}
                yield compiled(kernels.attend, card, types, sizes, shape.warps, overlaps, shape.stages)
        for delta, parts in (("*fp32", 0), (half, 1), ("*fp32", 8)):
            for width, block in ((4096, 4096), (2560, 4096), (768, 1024)):
                types = {"residual": "*fp32", "delta": delta, "weight": "*fp32", "out": half, "finite": "*i32"}
                types |= {"count": "*i32", "epsilon": "fp32", "inv_scale": "fp32", "factor": "fp32"}
                types |= {"row_scales": "*fp32", "column_scales": "*fp32", "out_scales": "*fp32"}
                constants = {"width": width, "block": block, "parts": parts, "has_weight": True, "watches": True}
                constants |= {"has_scales": False, "gives_bytes": False}
                yield compiled(kernels.add_norm, card, types, constants, norm_warps(block), overlaps)
        for activation in ("relu", "gelu", "gelu_new", "silu"):
            constants = {"width": 10240, "activation": activation, "is_gated": activation != "relu", "block": 1024}
            yield compiled(kernels.gate, card, {"joined": half, "out": half, "factor": "fp32"}, constants, 4, overlaps)
    yield from products(card, overlaps)


def products(card: Card, overlaps: bool) -> Iterator[dict[str, Any]]:
    """Those of few rows, and where launches need not overlap those in tiles."""
    for half in ("*fp16", "*bf16"):
        for (kind, rows), configurations in configurations_on(card).items():
            for configuration in configurations:
                constants = {"block_rows": rows, **product_constants(kind, configuration)}
                yield compiled(multiply, card, _types(kind, half), constants, configuration.warps, overlaps)
        # On AMD's cards torch multiplies many rows.
        for kind in () if overlaps or card.is_amd else KINDS:
            for tile in tile_candidates(kind, card.capability == (9, 0)):
                constants = {"block_rows": tile.block_rows, **product_constants(kind, tile)}
                yield compiled(multiply_tiles, card, _types(kind, half), constants, tile.warps, overlaps)


def _types(kind: Kind, half: str) -> dict[str, str]:
    return {"x": half, "weight": half, "out": "*fp32" if kind == "summed" else half, "rows": "i32"}


def product_constants(kind: Kind, configuration: Any) -> dict[str, Any]:
    return {
        "columns": 4096,
        "depth": 10240,
        "block_columns": configuration.block_columns,
        "block_depth": configuration.block_depth,
        "parts": configuration.parts,
        "activation": "gelu_new" if kind == "gated" else "none",
        "is_gated": kind == "gated",
        "stages": configuration.stages,
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        card = Card("a card", argument if argument.startswith("gfx") else f"sm_{argument}")
        for overlaps in (False, True) if card.can_overlap else (False,):
            for found in all_of(card, overlaps):
                print(json.dumps({"capability": argument, **found}), flush=True)
