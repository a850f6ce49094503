"""What torch compiles: the encoder, one graph for each of a few token counts, and the step of generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nai_t5_core.backends.compile_limit import compile_with_limit
from nai_t5_core.backends.compiled_steps import CompiledSteps
from nai_t5_core.model.attention import AttentionPlan
from nai_t5_core.model.attention_choice import FlexUnavailableError, missing_for_flex, refuse_unsupported
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.fixed_weights import has_fixed_weights
from nai_t5_core.model.flex import BLOCK
from nai_t5_core.model.offloading import refuse_offloaded
from nai_t5_core.model.packing import TOKEN_BUCKETS, PaddingPolicy, bucket_for
from nai_t5_core.model.precision import is_finite
from nai_t5_core.model.t5 import T5Model

Model = TypeVar("Model", bound=T5Model)

# Graphs beside those of the buckets: for rows longer than the largest, calls with gradients or under inference mode.
_SPARE_GRAPHS = 8

# The first call compiles, the second records the CUDA graph, if there is one, and the third runs it.
_CALLS_TO_BE_READY = 3


class CompiledRunner:
    """A stack's blocks, compiled; see :func:`compile_stack`.

    Args:
        buckets, options: see :func:`compile_stack`.
    """

    name = "flex, compiled"

    def __init__(self, buckets: tuple[int, ...], **options: Any) -> None:
        self.buckets, self._options = buckets, options
        self._run = compile_with_limit(_run, len(buckets) + _SPARE_GRAPHS, dynamic=False, **options)

    def __call__(
        self,
        stack: T5EncoderStack,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        *,
        inputs_embeds: Tensor | None,
        padding: PaddingPolicy,
        extra_pad: int,
    ) -> Tensor | None:
        if attention_mask is not None and attention_mask.ndim > 2:
            # The mask's shape differs from batch to batch, and each would be compiled anew.
            return None
        embeddings, plan, packing = stack.prepare(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            padding=padding,
            extra_pad=extra_pad,
            buckets=self.buckets,
        )
        tokens = len(embeddings)
        filled = nn.functional.pad(embeddings, (0, 0, 0, bucket_for(tokens, self.buckets) - tokens))
        # A copy, since a CUDA graph writes its next result to the same place.
        hidden = self._run(stack.encoder, filled, plan, stack.dtype)[:tokens].clone()
        # If it is not finite, the modules encode again, and the guard finds the cause.
        return None if stack.guard is not None and not is_finite(hidden) else packing.unpack(hidden)

    def refusal(self, stack: T5EncoderStack) -> str | None:
        """See :class:`nai_t5_core.model.encoder.StackRunner`."""
        return None

    def describe(self, stack: T5EncoderStack) -> str:
        """Its name."""
        return self.name

    def __getstate__(self) -> dict[str, Any]:
        return {"buckets": self.buckets, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["buckets"], **state["options"])  # type: ignore[misc]


def _run(encoder: nn.Module, embeddings: Tensor, plan: AttentionPlan, dtype: torch.dtype) -> Any:
    return encoder(embeddings, plan, dtype)


def compile_stack(
    stack: T5EncoderStack,
    mode: str | None = None,
    buckets: Sequence[int] = TOKEN_BUCKETS,
    **options: Any,
) -> T5EncoderStack:
    """Makes torch compile everything from the embeddings to the final norm, at the first use of each bucket.

    A packed row is padded to the next bucket, and attention is flex, so there are at most as many compilations as
    buckets. torch keeps compiled kernels on disk, so that later processes compile faster. Batches with masks of 3 and 4
    dimensions run uncompiled.

    Args:
        mode: of torch.compile: ``"reduce-overhead"`` records CUDA graphs, ``"max-autotune"`` tries out kernels.
        buckets: rising multiples of 128.
        options: passed on to torch.compile.

    Returns:
        The same stack, changed.

    Raises:
        ValueError: invalid buckets, or a model that is prepacked, quantised, offloaded or not supported by flex
            attention.
        FlexUnavailableError: there is no compiler.
    """
    sizes = tuple(buckets)
    if not sizes or any(size < 1 or size % BLOCK for size in sizes) or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"buckets={sizes}; they must be rising multiples of {BLOCK}, and at least one")
    refuse_offloaded(stack, "compiled")
    refuse_unsupported(stack.device, stack.dtype, stack.config.d_kv)
    _refuse_prepacked(stack)
    if missing := missing_for_flex(stack.device):
        raise FlexUnavailableError(f"the encoder cannot be compiled here: {missing}")
    stack.runner = CompiledRunner(sizes, **options, mode=mode)
    return stack


def compile_steps(model: Model, blocks_at_once: int = 4, **options: Any) -> Model:
    """Makes torch compile the decoder's step in generation on the CPU: greedy, sampled and with beams.

    Compiling takes up to half a minute at the first token, separately for a lone text, for several prompts, for each
    number of beams, for the first mask and for the first prompt of a single token. Call this before the model is
    prepacked, and after the last change of its weights.

    Args:
        blocks_at_once: the most blocks in one graph; the graph of the first blocks runs all others as well. With larger
            graphs a step calls fewer of them, and compiling takes longer.
        options: passed on to torch.compile.

    Returns:
        The same model, changed.

    Raises:
        ValueError: the model is not on the CPU, in float16, prepacked or quantised; ``blocks_at_once`` below 1.
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
        raise ValueError(
            "the model is prepacked or quantised for this CPU already; compile it before, or load it anew (a quantised "
            "file with unpack=True)"
        )


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
    if not isinstance(stack.runner, CompiledRunner):
        raise ValueError("the model is not compiled; call compile_stack first, or load it with compile=True")
    buckets = stack.runner.buckets
    wanted = tuple(
        size for index, size in enumerate(buckets) if up_to is None or index == 0 or buckets[index - 1] < up_to
    )
    for done, size in enumerate(wanted):
        for _ in range(_CALLS_TO_BE_READY):
            stack(torch.zeros(1, size, dtype=torch.long))
        if progress is not None:
            progress(done + 1, len(wanted))
    return wanted
