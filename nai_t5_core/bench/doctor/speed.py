"""How long our encoder takes at common prompt lengths, beside the least time that the machine allows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nai_t5_core.backends.choose import quantize_int8, why_not_int8
from nai_t5_core.backends.cuda.graph_times import seconds_of
from nai_t5_core.backends.cuda.runner import CudaRunner
from nai_t5_core.bench.clock import synchronize, timed
from nai_t5_core.bench.doctor.patient import Finding, Patient, encoding_by
from nai_t5_core.bench.peers import own_encoder
from nai_t5_core.bench.roofline import encoder_work, projection_shapes
from nai_t5_core.float16.guard import encode_guarded

LENGTHS = (20, 64, 128, 512)
BATCHES = {"2 prompts": (12, 45), "8 prompts": (5, 22, 38, 55, 71, 87, 104, 120), "32 prompts": tuple(range(9, 73, 2))}
PADDED_TO = 512


@torch.no_grad()
def measure_lengths(patient: Patient) -> Finding:
    """Times of one prompt without padding, as ``TextEncoder`` encodes it, with the check for NaN; ids on the CPU."""
    found: dict[str, Any] = {}
    for length in LENGTHS:
        ids = patient.ids(1, length)
        found[str(length)] = timed(partial(patient.encode, ids), patient.device)
        found[str(length)]["work"] = work(patient, (length,))
    return _about(patient, found)


@torch.no_grad()
def measure_int8(patient: Patient) -> Finding:
    """The times of :func:`measure_lengths` with ``quantize="int8"``; ``reason`` where this device has none."""
    stack = own_encoder(patient.config, patient.state, patient.dtype)
    if reason := why_not_int8(stack):
        return {"reason": reason}
    encode = partial(encode_guarded, quantize_int8(stack))
    return {
        "times": {str(length): timed(partial(encode, patient.ids(1, length)), patient.device) for length in LENGTHS}
    }


@torch.no_grad()
def measure_batches(patient: Patient) -> Finding:
    """Times of prompts of many lengths, padded and masked, whose pad rows are skipped."""
    found: dict[str, Any] = {}
    for name, lengths in BATCHES.items():
        ids, mask = padded(patient, lengths)
        found[name] = timed(partial(patient.encode, ids, mask, padding="skip"), patient.device)
        found[name]["work"] = work(patient, lengths)
    return _about(patient, found)


def padded(patient: Patient, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Ids and mask [prompts, PADDED_TO] on the CPU."""
    ids = patient.ids(len(lengths), PADDED_TO)
    return ids, torch.arange(PADDED_TO)[None, :] < torch.tensor(lengths)[:, None]


def work(patient: Patient, lengths: tuple[int, ...], weight_bytes: int = 2) -> dict[str, int]:
    """The operations and bytes of an encode of the timed model."""
    found = encoder_work(patient.config, lengths, weight_bytes)
    return {"flops": found.flops, "bytes": found.nbytes}


def _about(patient: Patient, times: dict[str, Any]) -> Finding:
    return {
        "model": patient.model.name,
        "words": patient.model.words,
        "dtype": str(patient.dtype).removeprefix("torch."),
        "by": patient.encoded_by,
        "times": times,
    }


@torch.no_grad()
def count_launches(patient: Patient) -> Finding:
    """Kernels, copies and waits of one encode, from torch's profiler and its warnings about synchronisation."""
    cases: dict[str, tuple[Tensor, Tensor | None]] = {
        f"1 prompt of {length}": (patient.ids(1, length), None) for length in (64, 512)
    }
    cases |= {name: padded(patient, lengths) for name, lengths in BATCHES.items()}
    encoders: dict[str, Callable[..., Tensor]] = {"torch": partial(encode_guarded, patient.stack)}
    if CudaRunner().refusal(patient.stack) is None:
        for name, eager in (("kernels", True), ("graphs", False)):
            encoders[name] = encoding_by(CudaRunner(eager), patient.stack)
    return {
        f"{name}, by {by}": _counted(patient, partial(encode, *case, padding="skip"))
        for name, case in cases.items()
        for by, encode in encoders.items()
    }


def _counted(patient: Patient, call: Callable[[], Tensor]) -> dict[str, Any]:
    call()
    call()
    synchronize(patient.device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize(patient.device)
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = [event for event in on_device if event.name.startswith(("Memcpy", "Memset"))]
    kernels = [event for event in on_device if event not in copies]
    slowest = defaultdict[str, float](float)
    for event in kernels:
        slowest[event.name[:90]] += event.device_time_total
    ranges = [event.time_range for event in on_device]
    return {
        "kernels": len(kernels),
        "kernels_per_layer": len(kernels) / patient.config.num_layers,
        "copies": dict(Counter(event.name for event in copies)),
        "device_us": sum(slowest.values()),
        "span_us": max(each.end for each in ranges) - min(each.start for each in ranges),
        "slowest_us": dict(sorted(slowest.items(), key=lambda item: -item[1])[:12]),
    }


@torch.no_grad()
def measure_products(patient: Patient) -> Finding:
    """Times of the projections of all layers by torch, without the rest of the encoder, for several numbers of rows."""
    shapes = projection_shapes(patient.config)
    joined = [shapes[0], shapes[1], (sum(out for out, _ in shapes[2:-1]), patient.config.d_model), shapes[-1]]
    layers = min(patient.config.num_layers, 8)
    weights = [[_random(shape, patient) for shape in joined] for _ in range(layers)]
    found: dict[str, Any] = {}
    for rows in (16, 32, 64, 128, 256, 512, 1024):
        inputs = [_random((rows, width), patient) for _, width in joined]
        each = {}
        for index, shape in enumerate(joined):
            call = lambda number, index=index, inputs=inputs: inputs[index] @ weights[number % layers][index].t()  # noqa: E731
            with torch.cuda.device(patient.device):
                seconds = seconds_of(call, range(layers))
            each["×".join(map(str, shape))] = seconds * 1e6
        found[str(rows)] = {"us": each, "encoder_ms": sum(each.values()) * patient.config.num_layers / 1e3}
    return {"dtype": str(patient.dtype).removeprefix("torch."), "rows": found}


def _random(shape: tuple[int, ...], patient: Patient) -> Tensor:
    return (torch.randn(shape, device=patient.device) * shape[-1] ** -0.5).to(patient.dtype)
