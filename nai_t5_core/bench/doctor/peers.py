"""Other encoders on the same weights and device, each timed alternately with ours."""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.bench.clock import timed
from nai_t5_core.bench.doctor.patient import Finding, Patient
from nai_t5_core.bench.doctor.speed import PADDED_TO, padded
from nai_t5_core.bench.peer_list import Peer, build_peer
from nai_t5_core.bench.peers import nai_t5_encoder

# Prompt lengths of one batch and the length that they are padded to; None: no padding.
_CASES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "64": ((64,), None),
    "512": ((512,), None),
    "64 padded to 512": ((64,), PADDED_TO),
    "8 prompts padded to 512": ((5, 22, 38, 55, 71, 87, 104, 120), PADDED_TO),
}


@torch.no_grad()
def time_transformers(patient: Patient) -> Finding:
    """transformers in our dtype, and in float32, in which ComfyUI computes a T5 on most cards."""
    found = _beside_ours(patient, "transformers", patient.dtype)
    if patient.device.type == "cuda":
        found["in float32"] = _beside_ours(patient, "transformers", torch.float32)
    return found


@torch.no_grad()
def time_nai_t5(patient: Patient) -> Finding:
    """nai-t5 as its README recommends for use without torch.compile: SDPA and fused norms."""
    return _beside_ours(patient, "nai-t5", patient.dtype)


@torch.no_grad()
def time_compiled_transformers(patient: Patient) -> Finding:
    """transformers under torch.compile with CUDA graphs, at 64 and 512 tokens."""
    peer = _built(patient, "transformers", patient.dtype)
    compiled = torch.compile(peer.implementation.forward, mode="reduce-overhead", dynamic=False)
    found: dict[str, Any] = {}
    for length in (64, 512):
        ids = patient.ids(1, length).to(patient.device)
        started = time.perf_counter()
        compiled(peer.model, ids, None)
        first = time.perf_counter() - started
        call = partial(compiled, peer.model, ids, None)
        found[str(length)] = {**timed(call, patient.device, warm_ups=3), "first_seconds": first}
    return {"version": peer.version, "times": found}


@torch.no_grad()
def time_compiled_nai_t5(patient: Patient) -> Finding:
    """nai-t5 with flex attention under torch.compile with CUDA graphs, at 512 tokens."""
    length = 512
    model = nai_t5_encoder(patient.config, patient.state, patient.dtype, flex_length=length).to(patient.device)
    compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)
    ids = patient.ids(1, length).to(patient.device)
    started = time.perf_counter()
    theirs = compiled(ids).clone()
    first = time.perf_counter() - started
    times = {
        **timed(partial(compiled, ids), patient.device, warm_ups=3),
        "first_seconds": first,
        "differs": _difference(theirs, patient.stack(ids), None),
    }
    return {"times": {str(length): times}}


def _beside_ours(patient: Patient, name: str, dtype: torch.dtype) -> dict[str, Any]:
    peer = _built(patient, name, dtype)
    found: dict[str, Any] = {}
    for case, (lengths, padded_to) in _CASES.items():
        ids, mask = padded(patient, lengths) if padded_to else (patient.ids(1, lengths[0]), None)
        ids = ids.to(patient.device)
        mask = None if mask is None else mask.to(patient.device)
        found[case] = {
            name: timed(partial(peer, ids, mask), patient.device),
            "ours": timed(partial(patient.encode, ids, mask, padding="skip"), patient.device),
        }
        found[case]["ratio"] = found[case][name]["ms"] / found[case]["ours"]["ms"]
        found[case]["differs"] = _difference(peer(ids, mask), patient.stack(ids, mask), mask)
    del peer
    gc.collect()
    if patient.device.type == "cuda":
        torch.cuda.empty_cache()
    return {"dtype": str(dtype).removeprefix("torch."), "times": found}


def _built(patient: Patient, name: str, dtype: torch.dtype) -> Peer:
    state = patient.state
    if dtype != patient.dtype:
        state = {key: tensor.to(dtype) for key, tensor in state.items()}
    peer = build_peer(name, patient.config, state, dtype)
    peer.model.to(patient.device)
    return peer


def _difference(theirs: Tensor, ours: Tensor, mask: Tensor | None) -> float:
    """The largest difference at real positions, relative to our largest value: a check that both compute the same."""
    theirs, ours = theirs.double(), ours.double()
    if mask is not None:
        theirs, ours = theirs[mask], ours[mask]
    return float((theirs - ours).abs().max() / ours.abs().max())
