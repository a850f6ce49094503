"""Compiles what torch makes of our encoder for GPUs that are not here, and prints what each kernel takes of one, as
lines of JSON: flex attention as the encoder calls it, and whole encoders as ``compile_stack`` compiles them.

python tests/compile_graphs_for_gpus.py 90 [80 …]
"""

from __future__ import annotations

import json
import sys

import torch
from pretended_compiler import no_values, pretend

from nai_t5_core.backends.compiled import compile_stack
from nai_t5_core.facts.config import T5Config, named_config
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.flex import FlexAttention
from nai_t5_core.model.layers import NoInit
from nai_t5_core.model.packing import pack_batch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LENGTHS = torch.tensor([[5], [9], [60], [30]])
# T5-XXL, and a T5 whose heads are twice as large.
MODELS = ("t5-v1_1-xxl", "t5-11b")
BUCKETS = (128, 512)


def attention(config: T5Config, dtype: torch.dtype) -> None:
    """Over a batch of four lengths, whose kernel takes every batch."""
    packing = pack_batch(torch.arange(64)[None] < LENGTHS, 4, 64, "skip")
    with no_values():
        q, k, v = torch.empty(3, packing.tokens, config.num_heads, config.d_kv, device="cuda", dtype=dtype)
        table = torch.empty(config.num_heads, 257, device="cuda", dtype=dtype)
        FlexAttention.over(packing.groups, 1.0, torch.device("cuda")).layer(table)(q, k, v)


def encoder(config: T5Config, dtype: torch.dtype, bucket: int) -> None:
    """Two layers; all others have the same kernels."""
    config = config.model_copy(update={"num_layers": 2, "num_decoder_layers": 0})
    with no_values():
        stack = T5EncoderStack(config, "fused", NoInit, device="cuda", dtype=dtype)
        compile_stack(stack, buckets=(bucket,))(inputs_embeds=torch.empty(1, bucket, config.d_model, device="cuda"))


def compile_all(capability: int) -> None:
    kernels = pretend(capability)
    for name in MODELS:
        config = named_config(name)
        for dtype in DTYPES:
            attention(config, dtype)
            tell(kernels, capability, f"flex, heads of {config.d_kv}, {str(dtype).removeprefix('torch.')}")
    for bucket in BUCKETS:
        encoder(named_config(MODELS[0]), torch.float16, bucket)
        tell(kernels, capability, f"compiled encoder, {bucket} tokens, float16")


def tell(kernels: list[dict[str, object]], capability: int, graph: str) -> None:
    """Prints what was compiled since the last call."""
    assert kernels, f"nothing was compiled for {graph}"
    for kernel in kernels:
        print(json.dumps({"capability": capability, "graph": graph, **kernel}), flush=True)
    kernels.clear()
    torch._dynamo.reset()


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        compile_all(int(argument))
