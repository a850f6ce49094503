"""Times of generation beside transformers and CTranslate2: the same random weights, in one process, taking turns.

The weights make the end token unreachable, so that all implementations take the same number of steps.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.auto_dtype import resolve_dtype
from nai_t5_core.backends.choices import ProductsChoice, refuse_missing
from nai_t5_core.backends.choose import prepack, quantize_int8, why_not_prepack
from nai_t5_core.backends.compiled import compile_steps
from nai_t5_core.bench.clock import timed_once
from nai_t5_core.bench.ctranslate2_peer import CTRANSLATE2, ctranslate2_generate, dtype_of_ctranslate2
from nai_t5_core.bench.parity import random_batch
from nai_t5_core.bench.parity_report import OWN, without_nan
from nai_t5_core.bench.peers import State, own_t5, random_state, transformers_t5
from nai_t5_core.bench.speed.machine import device_name, threads_set
from nai_t5_core.bench.speed.results import Spread
from nai_t5_core.bench.speed.variants import INT8, OWN_COMPILED
from nai_t5_core.facts.config import T5Config, named_config
from nai_t5_core.generation.t5 import T5
from nai_t5_core.model.decoder_attention import DecoderCache
from nai_t5_core.model.precision import resolve_device

TRANSFORMERS = "transformers"
GENERATION_PEERS = (TRANSFORMERS, CTRANSLATE2)

# From ids [prompts, length], number of beams and number of new tokens to generated tokens [prompts, new tokens].
Generate = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True)
class GenerationCase:
    """A batch of prompts and how they are continued. ``slug`` is the case's name on the command line."""

    slug: str
    name: str
    prompts: int
    beams: int


GENERATION_CASES = (
    GenerationCase("beams", "4 beams, 8 prompts", prompts=8, beams=4),
    GenerationCase("greedy", "greedy, 1 prompt", prompts=1, beams=1),
    GenerationCase("greedy-8", "greedy, 8 prompts", prompts=8, beams=1),
)


@dataclass(frozen=True)
class GenerationTiming:
    """One implementation in one case.

    Attributes:
        seconds: of one call, encoding the prompts included.
        ratio: how many times longer than ours it takes.
        tokens_per_second: tokens of the returned texts per second.
        same_texts: the share of its texts that equal ours, token for token.
    """

    name: str
    seconds: Spread
    ratio: Spread
    tokens_per_second: Spread
    same_texts: float


@dataclass(frozen=True)
class CacheMemory:
    """Bytes of our cached keys and values.

    Attributes:
        computed: the size by the shapes: every layer's keys and values of every token of every beam.
        allocated: the size of the cache.
        written: the part of the cache that this generation used; the system backs only that part with memory.
        prompts: the size of the prompts' keys and values, which all beams share; not part of the cache.
    """

    computed: int
    allocated: int
    written: int
    prompts: int


@dataclass(frozen=True)
class GenerationResult:
    """One case: our timing first, then the others."""

    case: GenerationCase
    timings: tuple[GenerationTiming, ...]
    memory: CacheMemory


@dataclass(frozen=True)
class GenerationReport:
    """The result of :func:`bench_generation`, with the machine and the versions."""

    size: str
    dtype: str
    device: str
    threads: int
    repeats: int
    prompt_length: int
    new_tokens: int
    versions: dict[str, str]
    cases: tuple[GenerationResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: seconds, bytes and ratios."""
        return dict(without_nan(asdict(self)))


def generation_cases_named(slugs: Sequence[str]) -> tuple[GenerationCase, ...]:
    """Cases by their slugs, in the given order.

    Raises:
        ValueError: an unknown slug.
    """
    known = {case.slug: case for case in GENERATION_CASES}
    if unknown := [slug for slug in slugs if slug not in known]:
        raise ValueError(f"unknown cases {unknown}; allowed: {', '.join(known)}")
    return tuple(known[slug] for slug in slugs)


def bench_generation(
    size: str | T5Config,
    dtype: str | torch.dtype = "auto",
    threads: int | None = None,
    repeats: int = 3,
    cases: Sequence[GenerationCase] = GENERATION_CASES,
    prompt_length: int = 48,
    new_tokens: int = 64,
    against: Sequence[str] = (TRANSFORMERS,),
    int8: bool = False,
    compiled: bool = False,
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    products: ProductsChoice = "auto",
) -> GenerationReport:
    """Times our generation as ``nai-t5 generate`` runs it, and that of transformers, on random weights of a size.

    Args:
        size: a name that :func:`nai_t5_core.facts.config.named_config` knows, or a config with a decoder.
        dtype, device: as for :func:`nai_t5_core.weights.load.load_t5`.
        threads: of torch on the CPU, None leaves the number as it is.
        repeats: rounds that count, after two short calls that do not (the second prepacks the weights).
        prompt_length, new_tokens: tokens of each prompt and of each text.
        against: of :data:`GENERATION_PEERS`.
        int8: ours also in 8 bits, and CTranslate2.
        compiled: ours also with :func:`nai_t5_core.backends.compiled.compile_steps`.
        progress: called with what is being done, in words.
        products: what computes ours, see :func:`nai_t5_core.backends.choose.prepack`.

    Raises:
        ValueError: an unknown size, dtype or device, products that are not possible there, fewer than one repeat; or
            transformers, fast 8-bit products or a compiler are asked for and absent; or CTranslate2 is, or computes in
            another dtype here.
    """
    tell = progress or (lambda _: None)
    config = named_config(size) if isinstance(size, str) else size
    place = resolve_device(device)
    model_dtype = resolve_dtype(dtype, place, has_decoder=True)
    if unknown := set(against) - set(GENERATION_PEERS):
        raise ValueError(f"unknown peers {sorted(unknown)}; allowed: {', '.join(GENERATION_PEERS)}")
    if repeats < 1:
        raise ValueError(f"repeats={repeats}; at least 1 round must count")
    refuse_missing(products, place, model_dtype)
    if int8:
        refuse_missing(products, place, model_dtype, "int8")
    with threads_set(threads) as used_threads:
        tell("drawing weights")
        state = _endless_state(config, seed, model_dtype)
        own = own_t5(config, state, model_dtype).to(place)
        ready = _prepacked(own, products)
        contenders: dict[str, Generate] = {OWN: _own(ready)}
        if int8:
            tell("quantising")
            contenders[INT8] = _own(quantize_int8(own_t5(config, state, model_dtype), products))
        if compiled:
            tell("compiling")
            contenders[OWN_COMPILED] = _own(_prepacked(compile_steps(own_t5(config, state, model_dtype)), products))
        if TRANSFORMERS in against:
            contenders[TRANSFORMERS] = _transformers(config, state, model_dtype, place)
        if CTRANSLATE2 in against:
            tell("converting for CTranslate2")
            theirs = dtype_of_ctranslate2(model_dtype)
            name = CTRANSLATE2 if theirs == model_dtype else f"{CTRANSLATE2}, {str(theirs).removeprefix('torch.')}"
            contenders[name] = ctranslate2_generate(config, state, theirs, int8=False)
            if int8:
                contenders[f"{CTRANSLATE2}, int8"] = ctranslate2_generate(config, state, theirs, int8=True)
        results = []
        for case in cases:
            ids, _ = random_batch(config, [prompt_length] * case.prompts, prompt_length, seed)
            timings = _time_case(case, contenders, ids.to(place), new_tokens, repeats, tell)
            results.append(GenerationResult(case, timings, _memory(ready, case, ids, new_tokens)))
    peers = {name: importlib.metadata.version(name) for name in against}
    return GenerationReport(
        size=size if isinstance(size, str) else config.size_name or f"d_model {config.d_model}",
        dtype=str(model_dtype).removeprefix("torch."),
        device=device_name(place),
        threads=used_threads,
        repeats=repeats,
        prompt_length=prompt_length,
        new_tokens=new_tokens,
        versions={"torch": torch.__version__, **peers},
        cases=tuple(results),
    )


def _endless_state(config: T5Config, seed: int, dtype: torch.dtype) -> State:
    """Random weights whose logit for the end token is always 0, so that some other token is always likelier."""
    state = random_state(config, seed, dtype=dtype)
    state["shared.weight" if config.tie_word_embeddings else "lm_head.weight"][config.eos_token_id] = 0
    return state


def _prepacked(model: T5, products: ProductsChoice) -> T5:
    return prepack(model, products) if products != "auto" or why_not_prepack(model) is None else model


def _own(model: T5) -> Generate:
    return lambda ids, beams, new_tokens: model.generate(ids, num_beams=beams, max_new_tokens=new_tokens)


def _transformers(config: T5Config, state: State, dtype: torch.dtype, device: torch.device) -> Generate:
    model: Any = transformers_t5(config, state, dtype).to(device)

    def generate(ids: Tensor, beams: int, new_tokens: int) -> Tensor:
        tokens: Tensor = model.generate(ids, do_sample=False, num_beams=beams, max_new_tokens=new_tokens)
        return tokens[:, 1:]

    return generate


def _time_case(
    case: GenerationCase,
    contenders: dict[str, Generate],
    ids: Tensor,
    new_tokens: int,
    repeats: int,
    tell: Callable[[str], None],
) -> tuple[GenerationTiming, ...]:
    for name, generate in contenders.items():
        tell(f"{case.name}: warm-up of {name}")
        for _ in range(2):
            generate(ids, case.beams, 2)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    texts: dict[str, Tensor] = {}
    for number in range(repeats):
        for name, generate in contenders.items():
            tell(f"{case.name}: round {number + 1} of {repeats}, {name}")
            duration, texts[name] = timed_once(lambda: generate(ids, case.beams, new_tokens), ids.device)  # noqa: B023
            seconds[name].append(duration.whole)
            if texts[name].shape != (case.prompts, new_tokens):
                raise ValueError(
                    f"{name} gave texts of shape {list(texts[name].shape)}, not all of {new_tokens} tokens"
                )
    return tuple(
        GenerationTiming(
            name,
            seconds=Spread.of(values),
            ratio=Spread.of_ratio(values, seconds[OWN]),
            tokens_per_second=Spread.of([case.prompts * new_tokens / each for each in values]),
            same_texts=float((texts[name] == texts[OWN]).all(dim=1).float().mean()),
        )
        for name, values in seconds.items()
    )


@torch.inference_mode()
def _memory(model: T5, case: GenerationCase, ids: Tensor, new_tokens: int) -> CacheMemory:
    config = model.config
    cache: DecoderCache = model.new_cache(case.prompts, case.beams, new_tokens + 1)
    model.generate(ids, cache=cache, num_beams=case.beams, max_new_tokens=new_tokens)
    per_token = 2 * config.num_decoder_layers * config.inner_dim * model.dtype.itemsize
    return CacheMemory(
        computed=per_token * case.prompts * case.beams * (new_tokens + 1),
        allocated=cache.nbytes,
        written=cache.written_nbytes,
        prompts=model.read(ids).nbytes,
    )
