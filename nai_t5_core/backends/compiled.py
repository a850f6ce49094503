"""What torch compiles: the encoder, one graph for each of a few token counts, and the step of generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from nai_t5_core.backends.compile_limit import compile_with_limit
from nai_t5_core.backends.compiled_steps import CompiledSteps
from nai_t5_core.model.attention_choice import FlexUnavailableError, missing_for_flex, refuse_unsupported
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.fixed_weights import has_fixed_weights
from nai_t5_core.model.flex import BLOCK
from nai_t5_core.model.packing import TOKEN_BUCKETS
from nai_t5_core.model.t5 import T5Model

Model = TypeVar("Model", bound=T5Model)

# Graphs beyond the buckets: rows longer than the largest, and calls with gradients or under inference mode.
_SPARE_GRAPHS = 8

# The first compiles, the second records the CUDA graph, if there is to be one, and the third runs it.
_CALLS_TO_BE_READY = 3


def compile_stack(
    stack: T5EncoderStack,
    mode: str | None = None,
    buckets: Sequence[int] = TOKEN_BUCKETS,
    **options: Any,
) -> T5EncoderStack:
    """Has torch compile everything between the embedding and the final norm, on first use of each bucket.

    A packed row is filled up to the next bucket, and attention is flex, so there are at most as many compilations as
    buckets. torch keeps compiled kernels on disk, so that later processes compile faster. Masks of 3 and 4 dimensions
    run uncompiled.

    Args:
        mode: of torch.compile: ``"reduce-overhead"`` records CUDA graphs, ``"max-autotune"`` tries out kernels.
        buckets: rising multiples of 128.
        options: passed on to torch.compile.

    Returns:
        The same stack, changed.

    Raises:
        ValueError: buckets that are none, a model that is prepacked or quantised or that flex attention does not
            support.
        FlexUnavailableError: there is no compiler.
    """
    sizes = tuple(buckets)
    if not sizes or any(size < 1 or size % BLOCK for size in sizes) or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"buckets={sizes}; they must be rising multiples of {BLOCK}, and at least one")
    refuse_unsupported(stack.device, stack.dtype, stack.config.d_kv)
    _refuse_prepacked(stack)
    if missing := missing_for_flex(stack.device):
        raise FlexUnavailableError(f"the encoder cannot be compiled here: {missing}")
    stack.buckets = sizes
    options |= {"mode": mode, "dynamic": False}
    # What Module.compile sets: calls of the module take it in place of forward.
    stack.encoder._compiled_call_impl = compile_with_limit(
        stack.encoder._call_impl, len(sizes) + _SPARE_GRAPHS, **options
    )
    return stack


def compile_steps(model: Model, blocks_at_once: int = 4, **options: Any) -> Model:
    """Has torch compile the decoder's step in generation on the CPU: greedy, sampled and with beams.

    It takes up to half a minute when the first token is wanted, for a lone text, several prompts, every other number of
    beams, the first mask and the first prompt of a single token. Call it before the model is prepacked, and after its
    weights were changed for the last time.

    Args:
        blocks_at_once: so many blocks at most are one graph, which then serves all others. With more of them a step
            calls fewer graphs, and compiling takes longer.
        options: passed on to torch.compile.

    Returns:
        The same model, changed.

    Raises:
        ValueError: the model is not on the CPU, in float16, prepacked or quantised; or no block at once.
        FlexUnavailableError: there is no compiler.
    """
    if model.device.type != "cpu" or model.dtype == torch.float16:
        raise ValueError(
            f"the model is in {model.dtype} on {model.device}; steps are compiled on the CPU in bfloat16 or float32"
        )
    if blocks_at_once < 1:
        raise ValueError(f"blocks_at_once={blocks_at_once}; it must be at least 1")
    _refuse_prepacked(model.decoder)
    if missing := missing_for_flex(model.device):
        raise FlexUnavailableError(f"the decoder cannot be compiled here: {missing}")
    model.compiled_steps = CompiledSteps(model, blocks_at_once, **options)
    return model


def _refuse_prepacked(module: nn.Module) -> None:
    if has_fixed_weights(module):
        raise ValueError("the model is prepacked or quantised for this CPU already; compile it before, or load it anew")


@torch.no_grad()
def warm_up(
    stack: T5EncoderStack, up_to: int | None = None, progress: Callable[[int, int], None] | None = None
) -> tuple[int, ...]:
    """Compiles the buckets of a compiled stack by encoding a row of each size.

    Args:
        up_to: leave out buckets beyond the one that holds this many tokens.
        progress: called with (buckets done, buckets in all).

    Returns:
        The buckets that are ready now.

    Raises:
        ValueError: the stack is not compiled.
    """
    if stack.buckets is None:
        raise ValueError("the model is not compiled; call compile_stack first, or load it with compile=True")
    wanted = tuple(
        size
        for index, size in enumerate(stack.buckets)
        if up_to is None or index == 0 or stack.buckets[index - 1] < up_to
    )
    for done, size in enumerate(wanted):
        for _ in range(_CALLS_TO_BE_READY):
            stack(torch.zeros(1, size, dtype=torch.long))
        if progress is not None:
            progress(done + 1, len(wanted))
    return wanted
