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
        errors = _errors(way, patient.dtype)
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


def _errors(way: ProductsChoice, dtype: torch.dtype) -> list[tuple[str, float, float]]:
    """What was asked, the difference relative to the largest value, and the most that it may be."""
    errors = []
    for kind, config in SMALL_CONFIGS.items():
        state = random_state(config)
        exact = own_encoder(config, state, torch.float64, "separate")
        asked = [(question, question.ask(exact)) for question in questions(config, 96)]
        forms: dict[str, tuple[Callable[..., T5EncoderStack], float]] = {
            str(dtype).removeprefix("torch."): (prepack, TOLERANCES[dtype]),
            "int8": (quantize_int8, TOLERANCE_INT8),
        }
        for name, (made, most) in forms.items():
            stack = made(own_encoder(config, state, dtype), way)
            errors += [
                (f"{kind}, {name}, {question.name}", difference(question.ask(stack), answer), most)
                for question, answer in asked
            ]
    return errors
