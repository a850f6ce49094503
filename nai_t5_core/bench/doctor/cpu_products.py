"""What may compute products on this processor: whether it is right, and how fast beside what ``"auto"`` takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nai_t5_core.backends.choices import ProductsChoice
from nai_t5_core.backends.choose import prepack, quantize_int8
from nai_t5_core.bench.clock import timed
from nai_t5_core.bench.doctor.numbers import SMALL_CONFIGS, difference, questions
from nai_t5_core.bench.doctor.patient import Finding, Patient
from nai_t5_core.bench.parity import TOLERANCE_INT8, TOLERANCES
from nai_t5_core.bench.peers import own_encoder, random_state
from nai_t5_core.float16.guard import encode_guarded
from nai_t5_core.model.encoder import T5EncoderStack

LENGTHS = (64, 512)
# The first is what the others are beside. AMX is taken only where it is named, until it was measured on a processor.
_WAYS: tuple[ProductsChoice, ...] = ("auto", "amx", "kernels", "onednn")

# What makes a form of an encoder, and how far its results may be off.
Forms = dict[str, tuple[Callable[..., T5EncoderStack], float]]


@torch.no_grad()
def compare(patient: Patient) -> Finding:
    """Small models by every way against float64, and the times of the timed model.

    What auto takes is not timed twice, and what this machine has not is told with the reason.
    """
    found: dict[str, Any] = {"checked": 0, "wrong": [], "by": {}, "times": {}, "missing": {}}
    for way in _WAYS:
        stack = own_encoder(patient.config, patient.state, patient.dtype)
        try:
            by = _name(prepack(stack, way))
        except ValueError as error:
            found["missing"][way] = str(error)
            continue
        if by in found["by"].values():
            continue
        forms: Forms = {str(patient.dtype).removeprefix("torch."): (prepack, TOLERANCES[patient.dtype])}
        if reason := _why_not_int8(way, patient.dtype):
            found["missing"][f"{way}, int8"] = reason
        else:
            forms["int8"] = (quantize_int8, TOLERANCE_INT8)
        errors = _errors(way, patient.dtype, forms)
        found["checked"] += len(errors)
        found["wrong"] += [f"{way}, {name}: off by {error:.2g}" for name, error, most in errors if not error <= most]
        found["by"][way] = by
        encode = partial(encode_guarded, stack)
        found["times"][way] = {
            str(length): timed(partial(encode, patient.ids(1, length)), patient.device) for length in LENGTHS
        }
    return found


def _name(stack: T5EncoderStack) -> str:
    block: Any = stack.encoder.block[0]
    return "torch" if block.runner is None else str(block.runner.name)


def _why_not_int8(way: ProductsChoice, dtype: torch.dtype) -> str | None:
    """Why a way that has products in a dtype has none in 8 bits, as oneDNN on most processors; None if it has."""
    config = next(iter(SMALL_CONFIGS.values()))
    try:
        quantize_int8(own_encoder(config, random_state(config), dtype), way)
    except ValueError as error:
        return str(error)
    return None


def _errors(way: ProductsChoice, dtype: torch.dtype, forms: Forms) -> list[tuple[str, float, float]]:
    """What was asked, the difference relative to the largest value, and the most that it may be."""
    errors = []
    for kind, config in SMALL_CONFIGS.items():
        state = random_state(config)
        exact = own_encoder(config, state, torch.float64, "separate")
        asked = [(question, question.ask(exact)) for question in questions(config, 96)]
        for name, (made, most) in forms.items():
            stack = made(own_encoder(config, state, dtype), way)
            errors += [
                (f"{kind}, {name}, {question.name}", difference(question.ask(stack), answer), most)
                for question, answer in asked
            ]
    return errors
