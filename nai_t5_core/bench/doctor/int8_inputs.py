"""What suits ``quantize="int8"`` on this card: from how many tokens on it is faster with inputs in 8 bits too, by which
products, and whether launches are to overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

import torch

from nai_t5_core.backends.choose import quantize_int8
from nai_t5_core.backends.cuda.card import card_of
from nai_t5_core.backends.cuda.card_choice import choice_for
from nai_t5_core.backends.cuda.device_refusals import missing_for_8_bits, missing_to_overlap
from nai_t5_core.backends.cuda.encoder import CudaEncoder
from nai_t5_core.backends.cuda.measured_card import INT8_WEIGHTS, NEVER, MeasuredCard, MeasuredInt8, MeasuredProduct
from nai_t5_core.bench.doctor.choosing import layers_of_an_xxl, named_card, times_of_lengths
from nai_t5_core.bench.doctor.eight_bits import TOLERANCE_OF_ACTIVATIONS
from nai_t5_core.bench.doctor.fastest import FASTER, LAYERS_FASTER, Together, fastest_for_few_rows
from nai_t5_core.bench.doctor.model import RandomModel
from nai_t5_core.bench.doctor.numbers import difference
from nai_t5_core.bench.doctor.own_kernels import fastest_milliseconds
from nai_t5_core.bench.doctor.patient import Finding, Patient
from nai_t5_core.bench.peers import own_encoder

if TYPE_CHECKING:
    from nai_t5_core.backends.cuda.torch_products import Products

_ROWS = (16, 64, 128, 256, 512, 1024)
WEIGHTS, INPUTS, OVERLAPPING = "weights in 8 bits", "inputs too", "inputs too, overlapping"


@torch.no_grad()
def measure_int8_choice(patient: Patient) -> Finding:
    """The fastest products of int8 with int8 one by one; and whether layers are faster with them, and with launches
    that overlap, than with weights alone in 8 bits.

    ``measured`` is what is to be written; ``wrong`` names results that are not right. ``reason`` where our kernels read
    no 8 bits.
    """
    if reason := missing_for_8_bits(patient.device, patient.dtype):
        return {"reason": reason}
    # Imported only here: Triton is needed.
    from nai_t5_core.bench.doctor import card_times

    fastest = fastest_for_few_rows(card_times.times_of_int8(patient.device))
    products = tuple(each.model_copy(update={"weights": INT8_WEIGHTS}) for each in fastest)
    times, wrong = _times_of_layers(patient, products)
    measured = MeasuredInt8(
        products=products, inputs_from=int8_inputs_from(times), overlapping_rows=int8_overlapping_rows(times)
    )
    return {
        "measured": measured.model_dump(mode="json"),
        "times": times,
        **_times_of_lengths(patient, measured),
        "wrong": wrong,
    }


def _times_of_layers(patient: Patient, products: Sequence[MeasuredProduct]) -> tuple[Together, list[str]]:
    """Milliseconds of a few layers from CUDA graphs, by the number of rows and the way; and which results are not
    right, in words.
    """
    stack = quantize_int8(layers_of_an_xxl(patient.device))
    ways = {name: CudaEncoder(stack, False, each) for name, each in _ways(patient, products).items()}
    times, wrong = dict[str, dict[str, float]](), list[str]()
    for rows in _ROWS:
        here = {name: encode for name, encode in ways.items() if name != OVERLAPPING or rows <= _most_rows(products)}
        ids = patient.ids(1, rows) % stack.config.vocab_size
        results = {name: encode(ids).double() for name, encode in here.items()}
        for name, result in results.items():
            error = difference(result, results[WEIGHTS])
            if not error <= TOLERANCE_OF_ACTIVATIONS["int8"]:
                wrong.append(f"{rows} tokens, {name}: off by {error:.2g}")
        times[str(rows)] = fastest_milliseconds(here, rows)
    return times, wrong


def _ways(patient: Patient, products: Sequence[MeasuredProduct]) -> dict[str, Products]:
    # Imported only here: Triton is needed.
    from nai_t5_core.backends.cuda.byte_products import ByteProducts, byte_configurations_on
    from nai_t5_core.backends.cuda.eight_bit_products import AskedEightBitProducts
    from nai_t5_core.backends.cuda.int8_products import int8_configurations
    from nai_t5_core.backends.cuda.torch_products import TorchProducts

    card = card_of(patient.device)
    how = (TorchProducts(), byte_configurations_on(card), False)
    known = int8_configurations(products)
    ways: dict[str, Products] = {
        WEIGHTS: ByteProducts(*how),
        INPUTS: AskedEightBitProducts(*how, int8_configurations=known),
    }
    if card is not None and card.can_overlap and not missing_to_overlap():
        most = _most_rows(products)
        ways[OVERLAPPING] = AskedEightBitProducts(*how, int8_configurations=known, int8_overlapping_rows=most)
    return ways


def _most_rows(products: Sequence[MeasuredProduct]) -> int:
    return max((each.rows for each in products), default=0)


def _times_of_lengths(patient: Patient, measured: MeasuredInt8) -> Finding:
    """``lengths`` of the timed model in int8, with attention as it was before this examination; of a user's model none,
    which would have to be read anew. ``no_lengths`` says why there are none for want of memory.
    """
    if not isinstance(patient.model, RandomModel):
        return {}
    card = named_card(patient)
    before = choice_for(card).measured or MeasuredCard.of(card, (), ())
    try:
        stack = quantize_int8(own_encoder(patient.config, patient.state, patient.dtype))
        return {"lengths": times_of_lengths(patient, stack, before.model_copy(update={"int8": measured}))}
    except torch.OutOfMemoryError:
        return {"no_lengths": f"the card has no room for {patient.model.name} in 16 and in 8 bits at once"}


def int8_overlapping_rows(times: Together) -> int:
    """Up to how many rows layers with inputs in 8 bits are faster where launches overlap; 0 where they are not."""
    most = 0
    for rows, time_of in sorted(times.items(), key=lambda item: int(item[0])):
        if time_of.get(OVERLAPPING, time_of[INPUTS]) > LAYERS_FASTER * time_of[INPUTS]:
            break
        most = int(rows)
    return most


def int8_inputs_from(times: Together) -> int:
    """The fewest rows from which on layers with inputs in 8 bits are so much faster that they are worth what they lose;
    NEVER where there are none. Once slower, they are not taken for fewer rows either.
    """
    found, overlapping = NEVER, int8_overlapping_rows(times)
    for rows, time_of in sorted(((int(rows), each) for rows, each in times.items()), key=itemgetter(0), reverse=True):
        if time_of[OVERLAPPING if rows <= overlapping else INPUTS] > FASTER * time_of[WEIGHTS]:
            break
        # The smallest graph computes all that is shorter.
        found = 1 if rows == min(_ROWS) else rows
    return found
