"""Compiles the kernels for GPUs that are not here, and prints what each takes of one, as lines of JSON.

python tests/compile_for_gpus.py 90 [80 …]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import triton
from cards import usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nai_t5_core.backends.cuda import kernels
from nai_t5_core.backends.cuda.documents import key_block
from nai_t5_core.backends.cuda.launches import norm_warps
from nai_t5_core.backends.cuda.product_kernel import multiply
from nai_t5_core.backends.cuda.products import configurations_for


def compiled(
    kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any], warps: int, overlaps: bool = False
) -> dict[str, Any]:
    """What a kernel takes: registers, bytes of stack and of shared memory. Pointers are on bounds of 16 bytes."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in types if types[name].startswith("*")}
    constants = constants | ({"overlaps": overlaps} if "overlaps" in names else {})
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": warps, "num_stages": 2} | ({"launch_pdl": True} if overlaps else {})
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "kernel": kernel.__name__,
        **constants,
        "warps": warps,
        **usage(result.asm["cubin"]),
        "shared": result.metadata.shared,
    }


def all_of(capability: int, overlaps: bool) -> Iterator[dict[str, Any]]:
    """The kernels in the sizes of T5-XXL and in odd ones."""
    for half in ("*fp16", "*bf16"):
        for query_block in (16, 64):
            for d_kv in (16, 64, 128):
                types = {"qkv": half, "table": "*fp32", "documents": "*i32", "out": half, "scale": "fp32"}
                sizes = {"heads": 64, "d_kv": d_kv, "reach": 128, "query_block": query_block}
                sizes["key_block"] = key_block(query_block)
                yield compiled(kernels.attend, capability, types, sizes, 4, overlaps)
        for delta, parts in (("*fp32", 0), (half, 1), ("*fp32", 8)):
            for width, block in ((4096, 4096), (2560, 4096), (768, 1024)):
                types = {"residual": "*fp32", "delta": delta, "weight": "*fp32", "out": half, "finite": "*i32"}
                types |= {"count": "*i32", "epsilon": "fp32", "inv_scale": "fp32"}
                types |= {"row_scales": "*fp32", "column_scales": "*fp32", "out_scales": "*fp32"}
                constants = {"width": width, "block": block, "parts": parts, "has_weight": True, "watches": True}
                constants |= {"has_scales": False, "gives_bytes": False}
                yield compiled(kernels.add_norm, capability, types, constants, norm_warps(block), overlaps)
        for activation in ("relu", "gelu", "gelu_new", "silu"):
            constants = {"width": 10240, "activation": activation, "is_gated": activation != "relu", "block": 1024}
            yield compiled(kernels.gate, capability, {"joined": half, "out": half}, constants, 4, overlaps)
    for (kind, rows), configurations in configurations_for(divmod(capability, 10)).items():
        for configuration in configurations:
            types = {"x": "*fp16", "weight": "*fp16", "out": "*fp32" if kind == "summed" else "*fp16", "rows": "i32"}
            constants = {
                "columns": 4096,
                "depth": 10240,
                "block_rows": rows,
                "block_columns": configuration.block_columns,
                "block_depth": configuration.block_depth,
                "parts": configuration.parts,
                "activation": "gelu_new" if kind == "gated" else "none",
                "is_gated": kind == "gated",
                "stages": configuration.stages,
            }
            yield compiled(multiply, capability, types, constants, configuration.warps, overlaps)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        capability = int(argument)
        for overlaps in (False, True) if capability >= 90 else (False,):
            for found in all_of(capability, overlaps):
                print(json.dumps({"capability": capability, **found}), flush=True)
