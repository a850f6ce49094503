"""The whole benchmark: weights, implementations, cases, loading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nai_t5_core.backends.auto_dtype import resolve_dtype
from nai_t5_core.backends.choices import ProductsChoice
from nai_t5_core.bench.peer_list import PEERS
from nai_t5_core.bench.peers import State, random_state
from nai_t5_core.bench.speed.cases import CASES, Case
from nai_t5_core.bench.speed.limits import BareProjections
from nai_t5_core.bench.speed.loading import measure_loading
from nai_t5_core.bench.speed.machine import device_name, threads_set
from nai_t5_core.bench.speed.results import BenchReport, CaseResult
from nai_t5_core.bench.speed.timing import Bench, run_case
from nai_t5_core.bench.speed.variants import Wanted, build_variants
from nai_t5_core.facts.config import T5Config, named_config
from nai_t5_core.model.precision import resolve_device


def run_bench(
    size: str | T5Config,
    dtype: str | torch.dtype = "auto",
    threads: int | None = None,
    repeats: int = 7,
    peers: Sequence[str] = ("transformers", "nai-t5"),
    cases: Sequence[Case] = CASES,
    with_load: bool = True,
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    comfyui: Path | None = None,
    compiled: bool = False,
    int8: bool = False,
    onednn: bool = False,
    products: ProductsChoice = "auto",
    layers: int | None = None,
) -> BenchReport:
    """Times our encoder and its peers on random weights of a published size.

    Ours runs as ``TextEncoder.from_pretrained`` makes it on this device, and also without prepacking where the former
    is prepacked. In every round each implementation encodes once, in turn; the projections alone are computed once; and
    the instruction that our kernels multiply with is timed alone. Implementations share tensors where their layouts
    agree; about five copies of the weights are in memory.

    Args:
        size: a name that :func:`nai_t5_core.facts.config.named_config` knows, or a config. Only the encoder is used.
        dtype, device: as for :func:`nai_t5_core.weights.load.load_encoder`; also for the peers, except ComfyUI's dtype.
        threads: of torch on the CPU, None leaves the number as it is.
        repeats: rounds that count, after two calls that do not.
        cases: the batches to time; without any, no encoder is built, and only loading is measured.
        with_load: also measure loading, in fresh processes and always on the CPU.
        progress: called with what is being done, in words.
        comfyui: a checkout of ComfyUI, whose T5 becomes a peer; it computes in float32.
        compiled: every implementation also under ``torch.compile``.
        int8: ours also in 8 bits.
        onednn: ours also by oneDNN instead of our kernels, as on processors that the kernels do not support.
        products: what computes ours, see :func:`nai_t5_core.backends.choose.prepack`; with weights in 16 bits on AVX2
            the peers are in float32, in which ours are computed. They are not limited to that instruction set: torch
            and oneDNN are by the variables ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA.
        layers: fewer layers than the size has; ratios are nearly those of all of them.

    Raises:
        ValueError: unknown size, dtype, device or peer, fewer than one repeat, layers that the size does not have, or
            no compiler for ``compiled``.
    """
    tell = progress or (lambda _: None)
    config = (named_config(size) if isinstance(size, str) else size).encoder_only()
    name = size if isinstance(size, str) else config.size_name or f"d_model {config.d_model}"
    if layers is not None:
        config, name = config.with_layers(layers), f"{name} with {layers} layers"
    place = resolve_device(device)
    model_dtype = resolve_dtype(dtype, place)
    if unknown := set(peers) - set(PEERS):
        raise ValueError(f"unknown peers {sorted(unknown)}; allowed: {', '.join(PEERS)}")
    if repeats < 1:
        raise ValueError(f"repeats={repeats}; at least 1 round must count")
    wanted = Wanted(tuple(peers), comfyui, compiled, int8, onednn, products)
    with threads_set(threads) as used_threads:
        tell("drawing weights")
        state = random_state(config, seed, dtype=model_dtype, device=place)
        measured = _Measured()
        if cases:
            measured = _measure(cases, config, state, model_dtype, place, wanted, repeats, seed, tell)
        loading = None
        if with_load:
            on_cpu = {name: tensor.cpu() for name, tensor in state.items()}
            loading = measure_loading(config, on_cpu, model_dtype, threads, repeats, tell)
    return BenchReport(
        size=name,
        dtype=str(model_dtype).removeprefix("torch."),
        device=f"{device_name(place)}{measured.by}",
        threads=used_threads,
        repeats=repeats,
        versions={"torch": torch.__version__, **measured.versions},
        cases=measured.cases,
        loading=loading,
        skipped=measured.skipped,
    )


@dataclass(frozen=True)
class _Measured:
    """The cases, the versions of the peers, and what was skipped."""

    cases: tuple[CaseResult, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    by: str = ""


def _measure(
    cases: Sequence[Case],
    config: T5Config,
    state: State,
    dtype: torch.dtype,
    device: torch.device,
    wanted: Wanted,
    repeats: int,
    seed: int,
    tell: Callable[[str], None],
) -> _Measured:
    """Times all cases. The encoders are freed on return, before loading is measured."""
    built = build_variants(config, state, dtype, device, wanted, tell)
    projections = None
    if built.can_prepack:
        tell("packing the projections alone")
        projections = BareProjections(config, built.computed_in)
    instructions = built.instructions
    bench = Bench(config, built.encoders, projections, built.kernel_dtypes, instructions, device, repeats, seed, tell)
    by = "" if instructions is None else f", {instructions.title} kernels"
    return _Measured(tuple(run_case(case, bench) for case in cases), built.versions, built.skipped, by)
