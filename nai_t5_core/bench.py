"""How fast our encoder is beside others: the same random weights, one process, taking turns.

Loading and cold start are measured in fresh processes, see :mod:`nai_t5_core.bench_load`.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nai_t5_core.bench_load import measure_loading
from nai_t5_core.bench_report import BenchReport, Case, CaseResult, Spread, markdown, render
from nai_t5_core.config import T5Config, named_config
from nai_t5_core.encoder import T5EncoderStack
from nai_t5_core.optimize import can_prepack, prepack
from nai_t5_core.parity import random_batch
from nai_t5_core.parity_report import OWN
from nai_t5_core.peers import PEERS, Peer, State, build_peer, own_encoder, random_state
from nai_t5_core.precision import resolve_device, resolve_dtype

__all__ = ["CASES", "BenchReport", "Case", "markdown", "render", "run_bench"]

EAGER = f"{OWN}, not prepacked"

CASES = (
    Case("32 tokens padded to 512, masked", (32,), 512, "skip"),
    Case("12, 77, 30 and 45 tokens padded to 512, masked", (12, 77, 30, 45), 512, "skip"),
    Case("32 tokens", (32,), 32, None),
    Case("512 tokens", (512,), 512, None),
    Case("32 tokens padded to 512, masked, pad rows kept", (32,), 512, "exact"),
)

# [batch, length] ids and mask to hidden states.
_Encode = Callable[[Case, Tensor, Tensor], Tensor]


def run_bench(
    size: str | T5Config,
    dtype: str | torch.dtype = "auto",
    threads: int | None = None,
    repeats: int = 7,
    peers: Sequence[str] = PEERS,
    cases: Sequence[Case] = CASES,
    with_load: bool = True,
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Times our encoder and its peers on random weights of a published size.

    Ours runs as ``TextEncoder.from_pretrained`` gives it on this device, and once more without prepacking where that
    differs. In every round each implementation encodes once, in turn. Tensors are shared between the implementations
    where their layouts agree; about four copies of the weights are in memory.

    Args:
        size: a name that :func:`nai_t5_core.config.named_config` knows, or a config. Only the encoder is used.
        dtype, device: as for :func:`nai_t5_core.load.load_encoder`; peers run in the same.
        threads: of torch on the CPU, None leaves the number as it is.
        repeats: rounds that count, after one or two that do not.
        with_load: also measure loading, in fresh processes and always on the CPU.
        progress: called with what is being done, in words.

    Raises:
        ValueError: unknown size, dtype, device or peer, or fewer than one repeat.
    """
    tell = progress or (lambda _: None)
    config = (named_config(size) if isinstance(size, str) else size).encoder_only()
    place = resolve_device(device)
    model_dtype = resolve_dtype(dtype, place)
    if unknown := set(peers) - set(PEERS):
        raise ValueError(f"unknown peers {sorted(unknown)}; allowed: {', '.join(PEERS)}")
    if repeats < 1:
        raise ValueError(f"repeats={repeats}; at least 1 round must count")
    skipped: list[str] = []
    with _threads(threads) as used_threads:
        tell("drawing weights")
        state = random_state(config, seed, dtype=model_dtype)
        encoders = _encoders(config, state, model_dtype, place, peers, skipped, tell)
        results = tuple(_run_case(case, config, encoders, place, repeats, seed, tell) for case in cases)
        names = [name for name in encoders if name in PEERS]
        encoders.clear()
        loading = measure_loading(config, state, model_dtype, threads, repeats, tell) if with_load else None
    return BenchReport(
        size=size if isinstance(size, str) else config.size_name or f"d_model {config.d_model}",
        dtype=str(model_dtype).removeprefix("torch."),
        device=_device_name(place),
        threads=used_threads,
        repeats=repeats,
        versions={name: importlib.metadata.version(name) for name in ("torch", *names)},
        cases=results,
        loading=loading,
        skipped=tuple(skipped),
    )


def _encoders(
    config: T5Config,
    state: State,
    dtype: torch.dtype,
    device: torch.device,
    peers: Sequence[str],
    skipped: list[str],
    tell: Callable[[str], None],
) -> dict[str, _Encode]:
    """Ours first, then the peers that can run this; reasons why others cannot go to ``skipped``."""
    tell(f"building {OWN}")
    eager = own_encoder(config, state, dtype).to(device)
    encoders = {OWN: _own(eager)}
    if can_prepack(eager):
        packed = T5EncoderStack(config, device="meta", dtype=dtype)
        packed.load_state_dict(eager.state_dict(), assign=True)
        encoders = {OWN: _own(prepack(packed.eval())), EAGER: _own(eager)}
    for name in peers:
        tell(f"building {name}")
        try:
            peer = build_peer(name, config, state, dtype)
        except ValueError as error:
            skipped.append(f"{name}: {error}")
            continue
        peer.model.to(device)
        encoders[name] = _of_peer(peer)
    return encoders


def _of_peer(peer: Peer) -> _Encode:
    return lambda case, ids, mask: peer(ids, None if case.padding is None else mask)


def _own(stack: T5EncoderStack) -> _Encode:
    def encode(case: Case, ids: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = stack(ids, None) if case.padding is None else stack(ids, mask, padding=case.padding)
        return out

    return encode


@torch.no_grad()
def _run_case(
    case: Case,
    config: T5Config,
    encoders: dict[str, _Encode],
    device: torch.device,
    repeats: int,
    seed: int,
    tell: Callable[[str], None],
) -> CaseResult:
    ids, mask = (x.to(device) for x in random_batch(config, case.prompt_lengths, case.length, seed))
    tell(f"{case.name}: warm-up")
    outputs = {name: encode(case, ids, mask)[mask].double().cpu() for name, encode in encoders.items()}
    for encode in encoders.values():
        encode(case, ids, mask)
    rounds: dict[str, list[float]] = {name: [] for name in encoders}
    for number in range(repeats):
        tell(f"{case.name}: round {number + 1} of {repeats}")
        for name, encode in encoders.items():
            _synchronize(device)
            started = time.perf_counter()
            encode(case, ids, mask)
            _synchronize(device)
            rounds[name].append(time.perf_counter() - started)
    own = outputs.pop(OWN)
    return CaseResult(
        case,
        seconds={name: Spread.of(values) for name, values in rounds.items()},
        ratios={name: _ratio(rounds[name], rounds[OWN]) for name in outputs},
        differences={name: float((other - own).abs().max() / own.abs().max()) for name, other in outputs.items()},
    )


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    single = [a / b for a, b in zip(theirs, ours, strict=True)]
    return Spread(Spread.of(theirs).median / Spread.of(ours).median, min(single), max(single))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """Sets torch's threads for a while; gives the number in use."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else platform.system()
    return f"{device.type} ({platform.machine()}, {capability})"
