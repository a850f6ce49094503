"""What is fastest on this card, measured; see :mod:`nai_t5_core.bench.doctor.kept_choice` for what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from nai_t5_core.backends.cuda.attention_shapes import AttentionShapes
from nai_t5_core.backends.cuda.card import Card, card_of
from nai_t5_core.backends.cuda.card_choice import MEASURED_HEADS, Choice, choice_for
from nai_t5_core.backends.cuda.device_refusals import missing_to_overlap
from nai_t5_core.backends.cuda.encoder import CudaEncoder
from nai_t5_core.backends.cuda.measured_card import MeasuredAttention, MeasuredCard, MeasuredProduct
from nai_t5_core.backends.cuda.refusals import refuses_for_good
from nai_t5_core.bench.clock import timed
from nai_t5_core.bench.doctor.fastest import (
    Together,
    fastest_attention,
    fastest_for_few_rows,
    fastest_products,
    overlapping_rows,
    products_taken,
    those_of_a_table,
)
from nai_t5_core.bench.doctor.numbers import difference
from nai_t5_core.bench.doctor.own_kernels import fastest_milliseconds, finished
from nai_t5_core.bench.doctor.patient import Finding, Patient
from nai_t5_core.bench.doctor.speed import LENGTHS
from nai_t5_core.bench.parity import TOLERANCES
from nai_t5_core.bench.peers import own_encoder, random_state
from nai_t5_core.facts.config import named_config
from nai_t5_core.model.encoder import T5EncoderStack

if TYPE_CHECKING:
    from nai_t5_core.bench.doctor.card_times import WayTime

# Of a T5-XXL: enough for one layer to find nothing of its weights in the cache.
_LAYERS = 4
# For each number of rows that products are chosen for.
_ROWS = (16, 32, 64, 128, 256, 512, 1024)

# Products whose launches overlap, by the name of the way.
Overlapping = Mapping[str, Sequence[MeasuredProduct]]


@torch.no_grad()
def measure_choice(patient: Patient) -> Finding:
    """The fastest products and shapes of attention one by one, and then whether layers are faster with them.

    ``measured`` is what is to be written, without what is not faster; ``wrong`` names results that are not right.
    """
    # Imported only here: Triton is needed.
    from nai_t5_core.bench.doctor.card_times import times_of_attention, times_of_few_rows, times_of_tiles

    card, device = named_card(patient), patient.device
    # Our products are made for NVIDIA's cards.
    times = [] if card.is_amd else [*times_of_few_rows(device), *times_of_tiles(card, device)]
    products, overlapping = fastest_products(times), _overlapping(card, times)
    attention = fastest_attention(times_of_attention(card, device))
    stack = layers_of_an_xxl(device)
    ways = _ways(stack, products, overlapping, _shapes(choice_for(card), attention))
    together, wrong = _times_together(patient, ways, {name: _most_rows(each) for name, each in overlapping.items()})
    measured = MeasuredCard.of(card, products_taken(products, overlapping, together), attention)
    measured = measured.model_copy(update={"overlapping_rows": overlapping_rows(together, overlapping)})
    return {
        "measured": measured.model_dump(mode="json"),
        "before": choice_for(card).origin,
        "times": together,
        "lengths": times_of_lengths(patient, patient.stack, measured),
        "wrong": wrong,
    }


def _times_together(
    patient: Patient, ways: Mapping[str, CudaEncoder], most_rows: Mapping[str, int]
) -> tuple[Together, list[str]]:
    """Milliseconds of the layers for each number of rows, from CUDA graphs; and which results are not right, in words.

    Args:
        most_rows: up to how many rows a way is timed, by its name; all where nothing is said.
    """
    times: dict[str, dict[str, float]] = {}
    wrong = []
    for rows in _ROWS:
        here = {name: encode for name, encode in ways.items() if rows <= most_rows.get(name, rows)}
        stack = ways["torch"].stack
        ids = patient.ids(1, rows) % stack.config.vocab_size
        expected = stack(ids).double()
        for name, encode in here.items():
            error = difference(encode(ids).double(), expected)
            if not error <= 2 * TOLERANCES[torch.float16]:
                wrong.append(f"{rows} tokens, {name}: off by {error:.2g}")
        times[str(rows)] = fastest_milliseconds(here, rows)
    return times, wrong


def _ways(
    stack: T5EncoderStack,
    products: Sequence[MeasuredProduct],
    overlapping: Overlapping,
    shapes: AttentionShapes,
) -> dict[str, CudaEncoder]:
    from nai_t5_core.backends.cuda.chosen_products import measured_products
    from nai_t5_core.backends.cuda.torch_products import TorchProducts

    computed_by = {"torch": TorchProducts(), "measured": measured_products(products)}
    computed_by |= {name: measured_products(each, _most_rows(each)) for name, each in overlapping.items()}
    return {name: CudaEncoder(stack, False, each, shapes) for name, each in computed_by.items()}


def _overlapping(card: Card, times: Sequence[WayTime]) -> Overlapping:
    """The products to try with launches that overlap; none where the card or Triton cannot."""
    from nai_t5_core.backends.cuda.chosen_products import configurations_on

    if not card.can_overlap or missing_to_overlap():
        return {}
    found = {
        "overlapping": fastest_for_few_rows(times),
        "overlapping, by the table": those_of_a_table(times, configurations_on(card)),
    }
    return {name: products for name, products in found.items() if products}


def _most_rows(products: Sequence[MeasuredProduct]) -> int:
    return max(each.rows for each in products)


def layers_of_an_xxl(device: torch.device) -> T5EncoderStack:
    """A few layers of a T5-XXL in float16, with random weights."""
    config = named_config("t5-v1_1-xxl").encoder_only().model_copy(update={"num_layers": _LAYERS})
    return own_encoder(config, random_state(config, dtype=torch.float16, device=device), torch.float16)


def times_of_lengths(patient: Patient, stack: T5EncoderStack, measured: MeasuredCard) -> dict[str, float]:
    """Milliseconds of a model in what was measured, with the check for NaN, as the step ``speed`` has them."""
    from nai_t5_core.backends.cuda.chosen_products import products_of

    if patient.device.type != "cuda" or refuses_for_good(stack) is not None:
        return {}
    choice = choice_for(named_card(patient))
    products = products_of(Choice(choice.card, choice.row, measured))
    encoder = CudaEncoder(stack, False, products, _shapes(choice, measured.attention))
    return {
        str(length): timed(partial(finished, encoder, patient.ids(1, length)), patient.device)["ms"]
        for length in LENGTHS
    }


def named_card(patient: Patient) -> Card:
    """The card that a choice is measured for."""
    card = card_of(patient.device)
    assert card is not None
    return card


def _shapes(choice: Choice, attention: Sequence[MeasuredAttention]) -> AttentionShapes:
    measured = MeasuredCard.of(choice.card, (), attention)
    return Choice(choice.card, choice.row, measured).attention_for(MEASURED_HEADS)
