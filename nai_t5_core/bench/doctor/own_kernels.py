"""The encoder by our kernels for CUDA: whether it is right, and how fast, launched one by one or from graphs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from nai_t5_core.backends.cuda.card import card_of
from nai_t5_core.backends.cuda.device_refusals import missing_to_overlap
from nai_t5_core.backends.cuda.encoder import CudaEncoder, ProductsChoice, cuda_encoder
from nai_t5_core.backends.cuda.graph_times import seconds_of_launches
from nai_t5_core.bench.clock import timed
from nai_t5_core.bench.doctor.numbers import SMALL_CONFIGS, difference, questions
from nai_t5_core.bench.doctor.patient import Finding, Patient
from nai_t5_core.bench.doctor.speed import BATCHES, LENGTHS, padded
from nai_t5_core.bench.parity import TOLERANCES
from nai_t5_core.bench.peers import own_encoder, random_state

_LENGTHS = (96, 101, 200)
# Of which the fastest counts: a card's clock and what else it does change within tenths of a second.
_ROUNDS = 3
_PRODUCTS: tuple[ProductsChoice, ...] = ("torch", "torch-float32", "triton", "triton-overlapping")


def _possible(device: torch.device) -> tuple[ProductsChoice, ...]:
    """The choices of products that a card can run."""
    card = card_of(device)
    return _PRODUCTS if card is not None and card.can_overlap and not missing_to_overlap() else _PRODUCTS[:-1]


@torch.no_grad()
def check(patient: Patient) -> Finding:
    """Every kind of T5 in half precision, eager and from CUDA graphs, on several lengths in turn, against float64."""
    wrong, errors = list[str](), dict[str, float]()
    checked = 0
    for kind, config in SMALL_CONFIGS.items():
        state = random_state(config)
        exact = own_encoder(config, state, torch.float64, "separate")
        asked = [question for length in _LENGTHS for question in questions(config, length)]
        answers = [question.ask(exact) for question in asked]
        for dtype in (torch.float16, torch.bfloat16):
            stack = own_encoder(config, state, dtype).to(patient.device)
            for eager in (True, False):
                for products in _possible(patient.device):
                    name = f"{kind}, {str(dtype).removeprefix('torch.')}, {'eager' if eager else 'graphs'}, {products}"
                    encode = cuda_encoder(stack, eager, products)
                    errors[name] = 0.0
                    for question, answer in zip(asked, answers, strict=True):
                        found = encode(question.ids, question.mask, question.padding)
                        error = difference(found.double().cpu(), answer)
                        errors[name], checked = max(errors[name], error), checked + 1
                        if not error <= TOLERANCES[dtype]:
                            length = question.ids.shape[1]
                            wrong.append(f"{name}, length {length}, {question.name}: off by {error:.2g}")
    return {"checked": checked, "largest_errors": errors, "wrong": wrong}


@torch.no_grad()
def time_kernels(patient: Patient) -> Finding:
    """The timed model; every call reads whether its result is finite."""
    cases: dict[str, Any] = {str(length): (patient.ids(1, length), None) for length in LENGTHS}
    cases |= {name: padded(patient, lengths) for name, lengths in BATCHES.items()}
    times: dict[str, Any] = {}
    variants: list[tuple[str, bool, ProductsChoice]] = [("eager, torch", True, "torch")]
    variants += [(name, False, name) for name in _possible(patient.device)]
    for variant, eager, products in variants:
        encode = cuda_encoder(patient.stack, eager, products)
        for name, (ids, mask) in cases.items():
            started = time.perf_counter()
            encode(ids, mask, "skip")
            first = time.perf_counter() - started
            call = partial(finished, encode, ids, mask)
            times.setdefault(name, {})[variant] = {**timed(call, patient.device), "first_seconds": first}
            expected = patient.stack(ids, mask, padding="skip").double()
            times[name][variant]["differs"] = difference(encode(ids, mask, "skip").double(), expected)
    return {"times": times}


def time_byte_products(patient: Patient) -> Finding:
    """Times the products of a T5-XXL's layer from weights in 8 bits by torch and by our kernel; gives the fastest three
    configurations of it, and every other way.
    """
    from nai_t5_core.backends.cuda.byte_product_times import time_byte_products

    found: dict[str, Any] = {}
    for kind, times in time_byte_products(device=patient.device).items():
        for each in times:
            those = found.setdefault(f"{kind}, {each.shape.name}, {each.rows} rows", [])
            if isinstance(each.how, str) or sum("Configuration" in line for line in those) < 3:
                those.append(str(each))
    return {"times": found}


def fastest_milliseconds(ways: Mapping[str, CudaEncoder], rows: int) -> dict[str, float]:
    """Of each way's graph for so many rows, which were encoded before, on the device alone: the best of some rounds."""
    rounds = [{name: milliseconds_of(encode, rows) for name, encode in ways.items()} for _ in range(_ROUNDS)]
    return {name: min(each[name] for each in rounds) for name in ways}


def milliseconds_of(encode: CudaEncoder, rows: int) -> float:
    """Of the graph by which so many rows were encoded before, on the device alone."""
    assert encode.graphs is not None
    with torch.cuda.device(encode.device):
        return seconds_of_launches(partial(encode.graphs.relaunch, rows)) * 1e3


def finished(encoder: CudaEncoder, ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Encodes ids [batch, length] without pads, and waits for the result."""
    assert bool(encoder.encode(ids, mask, "skip").finite), "the result is not finite"
