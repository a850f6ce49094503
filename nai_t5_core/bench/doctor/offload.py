"""How long an encode takes whose layers come from the host's memory, beside what the bus alone takes for them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.choices import missing_for_int8
from nai_t5_core.backends.cuda.int8 import quantise_at_rest
from nai_t5_core.backends.offload.mover import CudaMover
from nai_t5_core.backends.offload.offload import offload_layers
from nai_t5_core.backends.offload.weights import weights_of
from nai_t5_core.bench.clock import device_seconds, timed
from nai_t5_core.bench.doctor.patient import Finding, Patient
from nai_t5_core.bench.peers import own_encoder, random_state
from nai_t5_core.facts.config import T5Config
from nai_t5_core.float16.guard import encode_guarded
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.layers import NoInit

LENGTHS = (64, 512)
# An encode should take at most this many times as long as the bus takes for the weights.
TARGET = 1.15


def measure(patient: Patient) -> Finding:
    """The timed model, with random weights in the host's memory, in the dtype that suits and in 8 bits."""
    how = (patient.config, patient.dtype, patient.device)
    missing = missing_for_int8(patient.device, patient.dtype)
    in_8_bits = {} if missing else {"int8": time_offloaded(*how, in_8_bits=True)}
    return {"kinds": {str(patient.dtype).removeprefix("torch."): time_offloaded(*how), **in_8_bits}, "target": TARGET}


@torch.no_grad()
def time_offloaded(config: T5Config, dtype: torch.dtype, device: torch.device, in_8_bits: bool = False) -> Finding:
    """Times of whole calls, the rate of the bus, and the memory that the device gives for it."""
    stack = alike_layers(config, dtype)
    if in_8_bits:
        quantise_at_rest(stack, device)
    before = torch.cuda.memory_allocated(device)
    offload_layers(stack, device)
    kept = sum(weight.nbytes for block in stack.encoder.block for weight in weights_of(block))
    rate = bus_rate(max(weights_of(stack.encoder.block[0]), key=lambda weight: weight.nbytes), device)
    torch.cuda.reset_peak_memory_stats(device)
    times: dict[str, Any] = {}
    for length in LENGTHS:
        ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
        times[str(length)] = timed(partial(encode_guarded, stack, ids), device)
        times[str(length)]["times the bus"] = times[str(length)]["ms"] / (kept / rate * 1e3)
    return {
        "by": stack.describe_attention(),
        "bytes": kept,
        "bus_bytes_per_second": rate,
        "bus_ms": kept / rate * 1e3,
        "device_bytes": torch.cuda.max_memory_allocated(device) - before,
        "times": times,
    }


def bus_rate(weight: Tensor, device: torch.device) -> float:
    """Bytes per second of copies from locked memory to the device."""
    mover = CudaMover(device)
    source = mover.locked(weight.nbytes)
    target = mover.buffer(weight.nbytes)
    return weight.nbytes / device_seconds(lambda _: target.copy_(source, non_blocking=True), device, 10)


def alike_layers(config: T5Config, dtype: torch.dtype) -> T5EncoderStack:
    """An encoder on the CPU whose layers have the same random weights, since drawing all takes minutes."""
    one = config.model_copy(update={"num_layers": 1})
    drawn = own_encoder(one, random_state(one, dtype=dtype), dtype).state_dict()
    stack = T5EncoderStack(config, "fused", NoInit, device="meta", dtype=dtype)
    names = stack.state_dict()
    stack.load_state_dict({name: drawn[_in_first_layer(name)] for name in names}, assign=True)
    return stack.eval()


def _in_first_layer(name: str) -> str:
    parts = name.split(".")
    return ".".join([*parts[:2], "0", *parts[3:]]) if parts[1] == "block" else name
