"""Times one case: in every round each implementation encodes once, and the limits are timed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from nai_t5_core.backends.kernels.sets import InstructionSet
from nai_t5_core.bench.clock import timed_once
from nai_t5_core.bench.parity import random_batch
from nai_t5_core.bench.parity_report import OWN
from nai_t5_core.bench.roofline import encoder_flops, projection_flops
from nai_t5_core.bench.speed.cases import Case
from nai_t5_core.bench.speed.flops import count_flops
from nai_t5_core.bench.speed.limits import BareProjections, register_rate
from nai_t5_core.bench.speed.memory import peak_bytes
from nai_t5_core.bench.speed.results import CaseResult, GuardCost, LeastTime, Limit, Spread, Timing
from nai_t5_core.bench.speed.variants import OWN_COMPILED, Encode
from nai_t5_core.facts.config import T5Config
from nai_t5_core.model.precision import is_finite


@dataclass(frozen=True)
class Bench:
    """What all cases have in common: the implementations, the limits and the settings."""

    config: T5Config
    encoders: dict[str, Encode]
    projections: BareProjections | None
    kernel_dtypes: Mapping[str, torch.dtype]
    instructions: InstructionSet | None
    device: torch.device
    repeats: int
    seed: int
    tell: Callable[[str], None]


@dataclass(frozen=True)
class _Rounds:
    """Seconds of each round, and the rates of the multiplying instruction."""

    encoders: dict[str, list[float]]
    guard: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    rates: dict[torch.dtype, list[float]] = field(default_factory=dict)


@torch.no_grad()
def run_case(case: Case, bench: Bench) -> CaseResult:
    """Times one case: three calls that do not count (for operations, for prepacking or compiling, and for memory), then
    the rounds.
    """
    batch = random_batch(bench.config, case.prompt_lengths, case.length, bench.seed)
    on_device = tuple(x.to(bench.device) for x in batch)
    # Ours takes ids from the CPU, where a tokenizer leaves them.
    calls = {
        name: partial(encode, case, *(batch if name.startswith(OWN) else on_device))
        for name, encode in bench.encoders.items()
    }
    # Graphs that were compiled for earlier cases must not count against the limit of recompilations.
    torch.compiler.reset()
    flops, memory, outputs = dict[str, int | None](), dict[str, int | None](), dict[str, Tensor]()
    for name, call in calls.items():
        bench.tell(f"{case.name}: warm-up of {name}")
        flops[name] = count_flops(call) if name != OWN_COMPILED else None
        call()
        # The second call prepacks the weights, so that the memory of later calls does not include that.
        outputs[name] = call().cpu()[batch[1]].double()
        memory[name] = peak_bytes(call, bench.device)
    rounds = _run_rounds(case, bench, calls)
    own, own_output = rounds.encoders[OWN], outputs[OWN]
    real_flops = encoder_flops(bench.config, case.prompt_lengths)
    timings = tuple(
        Timing(
            name,
            seconds=Spread.of(seconds),
            ratio=Spread.of_ratio(seconds, own),
            tokens_per_second=Spread.of([case.real_tokens / each for each in seconds]),
            flops=flops[name],
            flops_ratio=_divided(flops[name], real_flops),
            peak_memory=memory[name],
            difference=float((outputs[name] - own_output).abs().max() / own_output.abs().max()),
        )
        for name, seconds in rounds.encoders.items()
    )
    limit = Limit(Spread.of(rounds.limit), Spread.of_ratio(rounds.limit, own)) if rounds.limit else None
    least = _least_times(case, bench, rounds, flops[OWN] or 0)
    guard = GuardCost(Spread.of(rounds.guard), Spread.of_ratio(rounds.guard, own))
    return CaseResult(case, timings, limit, least, guard)


def _least_times(case: Case, bench: Bench, rounds: _Rounds, flops: int) -> tuple[LeastTime, ...]:
    projections = projection_flops(bench.config, case.computed_tokens)
    found = []
    for name, dtype in bench.kernel_dtypes.items():
        rates = zip(rounds.rates[dtype], rounds.rates[bench.kernel_dtypes[OWN]], strict=True)
        seconds = [projections / rate + (flops - projections) / own_rate for rate, own_rate in rates]
        reached = Spread.of_ratio(seconds, rounds.encoders[name])
        found.append(LeastTime(name, Spread.of(rounds.rates[dtype]), Spread.of(seconds), reached))
    return tuple(found)


def _divided(flops: int | None, real_flops: int) -> float | None:
    return None if flops is None else flops / real_flops


def _run_rounds(case: Case, bench: Bench, calls: Mapping[str, Callable[[], Tensor]]) -> _Rounds:
    products = bench.projections.of(case.computed_tokens) if bench.projections is not None else None
    if products is not None:
        products()
    rounds = _Rounds({name: [] for name in calls}, rates={dtype: [] for dtype in bench.kernel_dtypes.values()})
    for number in range(bench.repeats):
        bench.tell(f"{case.name}: round {number + 1} of {bench.repeats}")
        for name, call in calls.items():
            duration, out = timed_once(call, bench.device)
            rounds.encoders[name].append(duration.whole)
            if name == OWN:
                rounds.guard.append(timed_once(partial(is_finite, out), bench.device)[0].whole)
        if products is not None:
            rounds.limit.append(timed_once(products, bench.device)[0].whole)
        for dtype, rates in rounds.rates.items():
            rates.append(register_rate(dtype, bench.instructions))
    return rounds
