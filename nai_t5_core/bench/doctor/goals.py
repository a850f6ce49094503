"""What the kernels for CUDA are to reach with a T5-XXL on an H100, beside what was found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nai_t5_core.bench.doctor.examination import Diagnosis
from nai_t5_core.bench.doctor.first_encode import MOST_SECONDS
from nai_t5_core.bench.doctor.memory import MOST_AT_LOAD
from nai_t5_core.bench.doctor.offload import TARGET

SIZE = "t5-v1_1-xxl"
# By the length of one prompt: milliseconds at most, and at most as a multiple of the least time.
_TIMES = {"64": (3.4, 1.2), "512": (7.5, 1.55)}
_IN_8_BITS = ("64", 2.1, 1.5)
# Gigabytes of the card at most: while it encodes.
_MEMORY = {"float16": 9.6, "bfloat16": 9.6, "int8": 5.0}

# What is to be reached, by how much, and what was found.
Row = tuple[str, str, str]
_NOT_MEASURED = "not measured"


def goals(diagnosis: Diagnosis) -> Iterator[Row]:
    """What is to be reached, by how much, and what was found; nothing where no T5-XXL was timed on a card.

    Ours is in the products and attention that were measured, if they were; in 8 bits in the products that were, with
    attention as it was before. ``not measured`` is what did not run.
    """
    models = [outcome.get("data", {}).get("model") for outcome in diagnosis.outcomes.values()]
    if diagnosis.device != "cuda" or SIZE not in models:
        return
    yield from _times(diagnosis)
    yield from _ratios(diagnosis)
    yield from _memory(diagnosis.data("memory"))
    yield from _offloaded(diagnosis.data("offload"))
    fresh = diagnosis.data("first-encode")
    told = f"{fresh['seconds']:.1f} s" if fresh else _NOT_MEASURED
    yield "first encode of a fresh process", f"≤ {MOST_SECONDS:.0f} s", told
    yield "ComfyUI's dynamic memory: stock / ours", "≥ 2", "by tests/comfyui/timing.py card"


def _ours(diagnosis: Diagnosis) -> dict[str, float]:
    """Milliseconds in 16 bits, by length."""
    times = diagnosis.data("speed").get("times", {})
    return {name: time["ms"] for name, time in times.items()} | diagnosis.data("choice").get("lengths", {})


def _times(diagnosis: Diagnosis) -> Iterator[Row]:
    speed, bytes_speed, ceilings = (diagnosis.data(step) for step in ("speed", "8-bit-speed", "ceilings"))
    ours = _ours(diagnosis)
    for length, (most, multiple) in _TIMES.items():
        work = speed.get("times", {}).get(length, {}).get("work")
        yield from _time(f"{length} tokens, 16 bits", most, multiple, ours.get(length), _least(work, ceilings, speed))
    length, most, multiple = _IN_8_BITS
    ms = bytes_speed.get("times", {}).get(length, {}).get("int8, auto", {}).get("ms")
    if not (chosen := diagnosis.data("int8-choice")).get("wrong"):
        ms = chosen.get("lengths", {}).get(length, ms)
    work = bytes_speed.get("work", {}).get(length)
    yield from _time(f"{length} tokens, 8 bits", most, multiple, ms, _least(work, ceilings, bytes_speed))


def _least(work: dict[str, int] | None, ceilings: dict[str, Any], timed: dict[str, Any]) -> float | None:
    return None if work is None else least_ms(work, ceilings, timed["dtype"])


def _time(what: str, most: float, multiple: float, ms: float | None, least: float | None) -> Iterator[Row]:
    yield what, f"≤ {most} ms", _NOT_MEASURED if ms is None else f"{ms:.2f} ms"
    found = _NOT_MEASURED if ms is None or least is None else f"{ms / least:.2f}"
    yield f"{what}: multiple of the least time", f"≤ {multiple}", found


def _ratios(diagnosis: Diagnosis) -> Iterator[Row]:
    ours = _ours(diagnosis)
    compiled = diagnosis.data("peers-compiled").get("times", {})
    for length, ratio in (("64", 2.0), ("512", 1.25)):
        what = f"transformers compiled / ours, {length} tokens"
        yield what, f"≥ {ratio}", _ratio(compiled.get(length), ours.get(length))
    padded = diagnosis.data("transformers").get("times", {}).get("64 padded to 512", {})
    found = f"{padded['ratio']:.2f}" if padded else _NOT_MEASURED
    yield "transformers / ours, 64 tokens padded to 512", "≥ 6", found
    flex = diagnosis.data("nai-t5-compiled").get("times", {})
    yield "nai-t5 by flex, compiled / ours, 512 tokens", "≥ 1.15", _ratio(flex.get("512"), ours.get("512"))


def _memory(found: dict[str, Any]) -> Iterator[Row]:
    for kind, each in found.get("kinds", dict.fromkeys(("float16", "int8"))).items():
        told = (_NOT_MEASURED, _NOT_MEASURED)
        if each:
            told = f"{each['most_while_encoding'] / 1e9:.2f} GB", f"{each['most_at_load'] / each['kept_bytes']:.2f}"
        yield f"memory of the card, {kind}", f"≤ {_MEMORY[kind]} GB", told[0]
        yield f"the same while it is loaded, {kind}: multiple of what stays", f"≤ {MOST_AT_LOAD}", told[1]


def _offloaded(found: dict[str, Any]) -> Iterator[Row]:
    for kind, each in found.get("kinds", dict.fromkeys(("float16", "int8"))).items():
        for length in ("64", "512"):
            told = f"{each['times'][length]['times the bus']:.2f}" if each else _NOT_MEASURED
            yield f"layers from the host, {kind}, {length} tokens / the bus's time", f"≤ {TARGET}", told


def least_ms(work: dict[str, int], ceilings: dict[str, Any], dtype: str) -> float | None:
    """The larger of the times that the bytes and the operations take at the rates of the ceilings, in milliseconds."""
    rate = ceilings.get("products", {}).get(dtype)
    if not isinstance(rate, float):
        return None
    return 1e3 * max(work["flops"] / rate, work["bytes"] / ceilings["read_bytes_per_second"])


def _ratio(theirs: dict[str, float] | None, ours: float | None) -> str:
    return f"{theirs['ms'] / ours:.2f}" if theirs and ours else _NOT_MEASURED
