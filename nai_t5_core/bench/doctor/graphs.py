"""What torch compiles on this device: flex attention, and the encoder in CUDA graphs."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.compiled import compile_stack
from nai_t5_core.bench.clock import timed
from nai_t5_core.bench.doctor.numbers import check_attention
from nai_t5_core.bench.doctor.patient import Finding, Patient
from nai_t5_core.bench.doctor.speed import BATCHES, LENGTHS, padded
from nai_t5_core.bench.peers import own_encoder
from nai_t5_core.float16.guard import encode_guarded
from nai_t5_core.model.attention_choice import AttentionChoice
from nai_t5_core.model.encoder import T5EncoderStack

# Ways to compute attention; empty options leave the shape of flex's kernels to torch, None is our choice.
_ATTENTIONS: dict[str, tuple[AttentionChoice, dict[str, Any] | None]] = {
    "sdpa": ("sdpa", None),
    "flex": ("flex", None),
    "flex, torch's options": ("flex", {}),
}


@torch.no_grad()
def check_flex(patient: Patient) -> Finding:
    """A small model by flex against float64; then the timed model by flex and by SDPA."""
    found: dict[str, Any] = check_attention("flex", patient.device, torch.float16)
    stack, times = patient.stack, dict[str, Any]()
    cases: dict[str, tuple[Tensor, Tensor | None]] = {str(length): (patient.ids(1, length), None) for length in LENGTHS}
    cases |= {name: padded(patient, lengths) for name, lengths in BATCHES.items()}
    before = stack.attention, stack.kernel_options
    for attention, (choice, options) in _ATTENTIONS.items():
        stack.attention, stack.kernel_options = choice, options
        started = time.perf_counter()
        for name, (ids, mask) in cases.items():
            call = partial(stack, ids, mask, padding="skip")
            times.setdefault(name, {})[attention] = timed(call, patient.device)
        times.setdefault("seconds in all", {})[attention] = time.perf_counter() - started
    stack.attention, stack.kernel_options = before
    return {**found, "times": times}


@torch.no_grad()
def time_compiled_short(patient: Patient) -> Finding:
    """Ours under torch.compile with CUDA graphs, in the smallest bucket, and what compiling costs."""
    return _time_compiled(patient, (64, 128))


@torch.no_grad()
def time_compiled_long(patient: Patient) -> Finding:
    """Ours under torch.compile with CUDA graphs, in the bucket of 512 tokens, and what compiling costs."""
    return _time_compiled(patient, (512,))


def _time_compiled(patient: Patient, lengths: tuple[int, ...]) -> Finding:
    """Times of these lengths, which are padded to the last of them, so that one graph is compiled."""
    stack = own_encoder(patient.config, patient.state, patient.dtype)
    compile_stack(stack, mode="reduce-overhead", buckets=lengths[-1:])
    found: dict[str, Any] = {}
    for length in lengths:
        ids = patient.ids(1, length)
        started = time.perf_counter()
        stack(ids)
        first = time.perf_counter() - started
        call = partial(encode_guarded, stack, ids)
        found[str(length)] = {**timed(call, patient.device, warm_ups=3), "first_seconds": first}
        found[str(length)]["differs"] = _difference_from_eager(stack, patient, ids)
    return {"times": found}


def _difference_from_eager(stack: T5EncoderStack, patient: Patient, ids: Tensor) -> float:
    eager = patient.stack(ids)
    return float((stack(ids) - eager).abs().max() / eager.abs().max())
