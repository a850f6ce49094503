"""From how many tokens on ``quantize="int8"`` is faster on this card with inputs in 8 bits too."""

from __future__ import annotations

from functools import partial

import torch

from nai_t5_core.backends.choose import quantize_int8
from nai_t5_core.backends.cuda.card import card_of
from nai_t5_core.backends.cuda.device_refusals import missing_for_8_bits
from nai_t5_core.backends.cuda.encoder import CudaEncoder
from nai_t5_core.backends.cuda.measured_card import NEVER
from nai_t5_core.bench.clock import timed
from nai_t5_core.bench.doctor.eight_bits import TOLERANCE_OF_ACTIVATIONS
from nai_t5_core.bench.doctor.numbers import difference
from nai_t5_core.bench.doctor.patient import Patient
from nai_t5_core.model.encoder import T5EncoderStack

_ROWS = (256, 512, 1024)
UNPACKED, IN_8_BITS = "unpacked", "inputs in 8 bits"

# Milliseconds by the number of rows and the way.
Times = dict[str, dict[str, float]]


@torch.no_grad()
def times_of_int8(patient: Patient, stack: T5EncoderStack) -> tuple[Times, list[str]]:
    """Both ways on a few layers, which become int8, and which results are not right, in words; nothing where our
    kernels read no 8 bits.
    """
    # Imported only here: Triton is needed.
    from nai_t5_core.backends.cuda.byte_products import ByteProducts, byte_configurations_on
    from nai_t5_core.backends.cuda.eight_bit_products import AskedEightBitProducts
    from nai_t5_core.backends.cuda.torch_products import TorchProducts

    if missing_for_8_bits(patient.device, stack.dtype):
        return {}, []
    stack = quantize_int8(stack)
    how = (TorchProducts(), byte_configurations_on(card_of(patient.device)), False)
    products = {UNPACKED: ByteProducts(*how), IN_8_BITS: AskedEightBitProducts(*how, least_rows=min(_ROWS))}
    ways = {name: CudaEncoder(stack, False, each) for name, each in products.items()}
    times, wrong = Times(), list[str]()
    for rows in _ROWS:
        ids = patient.ids(1, rows) % stack.config.vocab_size
        results = {name: encode(ids).double() for name, encode in ways.items()}
        error = difference(results[IN_8_BITS], results[UNPACKED])
        if not error <= TOLERANCE_OF_ACTIVATIONS["int8"]:
            wrong.append(f"{rows} tokens, int8 with {IN_8_BITS}: off by {error:.2g}")
        times[str(rows)] = {name: timed(partial(encode, ids), patient.device)["ms"] for name, encode in ways.items()}
    return times, wrong


def int8_inputs_from(times: Times, faster: float) -> int | None:
    """The fewest rows from which on inputs in 8 bits take at most ``faster`` of the other way's time.

    NEVER where there are none; None where nothing was timed.
    """
    found = NEVER if times else None
    for rows, time_of in sorted(times.items(), key=lambda item: -int(item[0])):
        if time_of[IN_8_BITS] > faster * time_of[UNPACKED]:
            break
        found = int(rows)
    return found
