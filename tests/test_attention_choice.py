"""Which attention a batch gets, and where the choice is told."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, random_state

from nai_t5_core import TextEncoder
from nai_t5_core.backends.kernels.build import why_not_kernels
from nai_t5_core.model.attention import DenseAttention, DocumentAttention
from nai_t5_core.model.attention_choice import (
    FLEX_FROM_LENGTHS,
    FlexUnavailableError,
    choose_attention,
    document_plan,
    missing_for_flex,
)
from nai_t5_core.model.flex import FlexAttention
from nai_t5_core.model.packing import pack_batch

CPU = torch.device("cpu")
HALF = torch.float16
SQUARE = (FLEX_FROM_LENGTHS, FLEX_FROM_LENGTHS)
compiled = pytest.mark.skipif(missing_for_flex(CPU) is not None, reason=f"no flex here: {missing_for_flex(CPU)}")


def test_auto_by_device_lengths_and_dtype() -> None:
    for lengths in (1, FLEX_FROM_LENGTHS, 100_000):
        assert choose_attention("cpu", lengths, HALF) == choose_attention("mps", lengths, HALF) == "sdpa"
    assert choose_attention("cuda", FLEX_FROM_LENGTHS - 1, HALF) == "sdpa"
    assert choose_attention("cuda", FLEX_FROM_LENGTHS, HALF) == "flex"
    assert choose_attention("cuda", FLEX_FROM_LENGTHS, torch.float32) == "sdpa"


@torch.no_grad()
def test_auto_on_the_cpu_is_sdpa_and_says_so() -> None:
    encoder = TextEncoder.from_pretrained(dtype="float32", device="cpu")
    assert isinstance(encoder.stack.prepare(torch.ones(8, 512, dtype=torch.long))[1], DocumentAttention)
    told = f"attention=auto: {'sdpa' if why_not_kernels() else 'kernels'}"
    assert told in repr(encoder) and told in repr(encoder.stack)
    encoder.stack.attention = "sdpa"
    assert "attention=sdpa" in repr(encoder)
    assert encoder.stack.prepare(torch.ones(1, 9, dtype=torch.long))[1].documents is None


@compiled
def test_the_choice_reaches_the_stack() -> None:
    encoder = TextEncoder.from_pretrained(dtype="float32", device="cpu", attention="flex")
    assert "attention=flex" in repr(encoder) and "attention=flex" in repr(encoder.stack)
    with torch.no_grad():
        assert isinstance(encoder.stack.prepare(torch.ones(1, 9, dtype=torch.long))[1], FlexAttention)


@torch.no_grad()
def test_auto_takes_sdpa_without_a_word_where_flex_cannot_be_compiled() -> None:
    """It chooses among what is there; only who asks for flex is told."""
    cuda, packing = torch.device("cuda"), pack_batch(torch.ones(SQUARE).tril() > 0, *SQUARE, "skip")
    assert len(packing.groups) == FLEX_FROM_LENGTHS
    if missing_for_flex(cuda) is None:
        pytest.skip("this machine has a GPU with Triton")
    assert isinstance(document_plan("auto", packing, 1.0, cuda, torch.bfloat16, 64), DocumentAttention)
    with pytest.raises(FlexUnavailableError, match=re.escape(str(missing_for_flex(cuda)))):
        document_plan("flex", packing, 1.0, cuda, torch.bfloat16, 64)
    with pytest.raises(ValueError, match="heads of size 8; on CUDA they need a d_kv of at least 16"):
        document_plan("flex", packing, 1.0, cuda, torch.bfloat16, 8)


@torch.no_grad()
def test_dense_masks_take_sdpa() -> None:
    stack = build_stack(TOY_CONFIGS["v1.1"], random_state(TOY_CONFIGS["v1.1"]))
    plan = stack.prepare(torch.ones(1, 9, dtype=torch.long), torch.ones(1, 9, 9, dtype=torch.bool))[1]
    assert isinstance(plan, DenseAttention)
