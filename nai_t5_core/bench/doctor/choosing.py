"""What is fastest on this card, measured; see :mod:`nai_t5_core.bench.doctor.kept_choice` for what becomes of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from nai_t5_core.backends.cuda.attention_shapes import AttentionShapes
from nai_t5_core.backends.cuda.card import Card, card_of
from nai_t5_core.backends.cuda.card_choice import MEASURED_HEADS, Choice, choice_for
from nai_t5_core.backends.cuda.encoder import CudaEncoder, cuda_encoder
from nai_t5_core.backends.cuda.measured_card import (
    TORCH,
    MeasuredAttention,
    MeasuredCard,
    MeasuredProduct,
)
from nai_t5_core.backends.cuda.refusals import refuses_for_good
from nai_t5_core.bench.clock import timed
from nai_t5_core.bench.doctor.int8_inputs import int8_inputs_from, times_of_int8
from nai_t5_core.bench.doctor.numbers import difference
from nai_t5_core.bench.doctor.own_kernels import finished
from nai_t5_core.bench.doctor.patient import Finding, Patient
from nai_t5_core.bench.doctor.speed import LENGTHS
from nai_t5_core.bench.parity import TOLERANCES
from nai_t5_core.bench.peers import own_encoder, random_state
from nai_t5_core.facts.config import named_config
from nai_t5_core.model.encoder import T5EncoderStack

if TYPE_CHECKING:
    from nai_t5_core.bench.doctor.card_times import WayTime

# What is not faster by this much is left to torch: a difference may be noise, and other ways round otherwise.
_FASTER = 0.97
# Of a T5-XXL: enough for one layer to find nothing of its weights in the cache.
_LAYERS = 4
# For each number of rows that products are chosen for.
_ROWS = (16, 32, 64, 128, 256, 512, 1024)


@torch.no_grad()
def measure_choice(patient: Patient) -> Finding:
    """The fastest products and shapes of attention one by one, and then whether layers are faster with them.

    ``measured`` is what is to be written, without what is not faster; ``wrong`` names results that are not right.
    """
    # Imported only here: Triton is needed.
    from nai_t5_core.bench.doctor.card_times import times_of_attention, times_of_few_rows, times_of_tiles

    card, device = _card(patient), patient.device
    # Our products are made for NVIDIA's cards.
    products = () if card.is_amd else fastest_products([*times_of_few_rows(device), *times_of_tiles(card, device)])
    attention = fastest_attention(times_of_attention(card, device))
    config = named_config("t5-v1_1-xxl").encoder_only().model_copy(update={"num_layers": _LAYERS})
    state = random_state(config, dtype=torch.float16, device=device)
    stack = own_encoder(config, state, torch.float16)
    together, wrong = _times_together(patient, stack, products, attention)
    in_8_bits, wrong_in_8_bits = times_of_int8(patient, stack)
    measured = MeasuredCard.of(card, without_slower_rows(products, together), attention)
    measured = measured.model_copy(update={"int8_inputs_from": int8_inputs_from(in_8_bits, _FASTER)})
    return {
        "measured": measured.model_dump(mode="json"),
        "before": choice_for(card).origin,
        "times": together,
        "int8": in_8_bits,
        "lengths": _times_of_lengths(patient, measured),
        "wrong": wrong + wrong_in_8_bits,
    }


def fastest_products(times: Iterable[WayTime]) -> tuple[MeasuredProduct, ...]:
    """The fastest way for every kind of product and number of rows, where it is faster than torch's."""
    groups: dict[tuple[str, int], list[WayTime]] = {}
    for each in times:
        groups.setdefault((each.kind, each.rows), []).append(each)
    found = []
    for (kind, rows), ways in groups.items():
        by_torch = min(each.microseconds for each in ways if each.way == TORCH)
        best = min(ways, key=lambda each: each.microseconds)
        if best.way != TORCH and best.microseconds > _FASTER * by_torch:
            best = next(each for each in ways if each.way == TORCH)
        found.append(
            MeasuredProduct(
                kind=kind,
                rows=rows,
                way=best.way,
                configuration=best.configuration,
                microseconds=best.microseconds,
                by_torch=by_torch,
            )
        )
    return tuple(found)


def fastest_attention(times: Iterable[WayTime]) -> tuple[MeasuredAttention, ...]:
    """The fastest shape for every number of tokens."""
    best: dict[int, WayTime] = {}
    for each in times:
        if each.rows not in best or each.microseconds < best[each.rows].microseconds:
            best[each.rows] = each
    return tuple(
        MeasuredAttention(tokens=tokens, microseconds=each.microseconds, **each.configuration)
        for tokens, each in best.items()
    )


def _times_together(
    patient: Patient,
    stack: T5EncoderStack,
    products: Sequence[MeasuredProduct],
    attention: Sequence[MeasuredAttention],
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Milliseconds of the layers for each number of rows, by torch's products and by those that were measured."""
    from nai_t5_core.backends.cuda.chosen_products import measured_products
    from nai_t5_core.backends.cuda.torch_products import TorchProducts

    shapes = _shapes(choice_for(_card(patient)), attention)
    ways = {
        "before": cuda_encoder(stack, products="torch"),
        "torch": CudaEncoder(stack, False, TorchProducts(), shapes),
        "measured": CudaEncoder(stack, False, measured_products(products), shapes),
    }
    times: dict[str, dict[str, float]] = {}
    wrong = []
    for rows in _ROWS:
        ids = patient.ids(1, rows) % stack.config.vocab_size
        expected = stack(ids).double()
        for name, encode in ways.items():
            error = difference(encode(ids).double(), expected)
            if not error <= 2 * TOLERANCES[torch.float16]:
                wrong.append(f"{rows} tokens, {name}: off by {error:.2g}")
            times.setdefault(str(rows), {})[name] = timed(partial(encode, ids), patient.device)["ms"]
    return times, wrong


def _times_of_lengths(patient: Patient, measured: MeasuredCard) -> dict[str, float]:
    """Milliseconds of the timed model in what was measured, with the check for NaN, as the step ``speed`` has them."""
    from nai_t5_core.backends.cuda.chosen_products import measured_products

    if patient.device.type != "cuda" or refuses_for_good(patient.stack) is not None:
        return {}
    shapes = _shapes(choice_for(_card(patient)), measured.attention)
    encoder = CudaEncoder(patient.stack, False, measured_products(measured.products), shapes)
    return {
        str(length): timed(partial(finished, encoder, patient.ids(1, length)), patient.device)["ms"]
        for length in LENGTHS
    }


def _card(patient: Patient) -> Card:
    card = card_of(patient.device)
    assert card is not None
    return card


def _shapes(choice: Choice, attention: Sequence[MeasuredAttention]) -> AttentionShapes:
    measured = MeasuredCard.of(choice.card, (), attention)
    return Choice(choice.card, choice.row, measured).attention_for(MEASURED_HEADS)


def without_slower_rows(
    products: Sequence[MeasuredProduct], together: dict[str, dict[str, float]]
) -> tuple[MeasuredProduct, ...]:
    """Products by torch alone for those numbers of rows where whole layers are not faster otherwise."""
    slower = {int(rows) for rows, times in together.items() if times["measured"] > times["torch"] * 0.99}
    return tuple(
        each.model_copy(update={"way": TORCH, "configuration": {}, "microseconds": each.by_torch})
        if each.rows in slower
        else each
        for each in products
    )
