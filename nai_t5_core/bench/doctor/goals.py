"""What the kernels for CUDA are to reach with a T5-XXL on an H100, beside what was found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nai_t5_core.bench.doctor.examination import Diagnosis

SIZE = "t5-v1_1-xxl"
# By the length of one prompt: milliseconds at most, and at most as a multiple of the least time.
_TIMES = {"64": (3.4, 1.2), "512": (7.5, 1.55)}


def goals(diagnosis: Diagnosis) -> Iterator[tuple[str, str, str]]:
    """What is to be reached, by how much, and what was found; nothing where no T5-XXL was timed on a card.

    Ours is in the products and attention that were measured, if they were. ``not measured`` is what did not run.
    """
    speed = diagnosis.data("speed")
    if diagnosis.device != "cuda" or speed.get("model") != SIZE:
        return
    ours = {name: time["ms"] for name, time in speed["times"].items()} | diagnosis.data("choice").get("lengths", {})
    for length, (most, multiple) in _TIMES.items():
        if length not in speed["times"]:
            continue
        yield f"{length} tokens, {speed['dtype']}", f"≤ {most} ms", f"{ours[length]:.2f} ms"
        least = least_ms(speed["times"][length]["work"], diagnosis.data("ceilings"), speed["dtype"])
        found = "not measured" if least is None else f"{ours[length] / least:.2f}"
        yield f"{length} tokens, multiple of the least time", f"≤ {multiple}", found
    compiled = diagnosis.data("peers-compiled").get("times", {})
    for length, ratio in (("64", 2.0), ("512", 1.25)):
        yield (
            f"transformers compiled / ours, {length} tokens",
            f"≥ {ratio}",
            _ratio(compiled.get(length), ours.get(length)),
        )
    padded = diagnosis.data("transformers").get("times", {}).get("64 padded to 512", {})
    found = f"{padded['ratio']:.2f}" if padded else "not measured"
    yield "transformers / ours, 64 tokens padded to 512", "≥ 6", found
    flex = diagnosis.data("nai-t5-compiled").get("times", {})
    yield "nai-t5 by flex, compiled / ours, 512 tokens", "≥ 1.15", _ratio(flex.get("512"), ours.get("512"))
    fresh = diagnosis.data("first-encode")
    yield "first encode of a fresh process", "≤ 10 s", f"{fresh['seconds']:.1f} s" if fresh else "not measured"


def least_ms(work: dict[str, int], ceilings: dict[str, Any], dtype: str) -> float | None:
    """The larger of the times that the bytes and the operations take at the rates of the ceilings, in milliseconds."""
    rate = ceilings.get("products", {}).get(dtype)
    if not isinstance(rate, float):
        return None
    return 1e3 * max(work["flops"] / rate, work["bytes"] / ceilings["read_bytes_per_second"])


def _ratio(theirs: dict[str, float] | None, ours: float | None) -> str:
    return f"{theirs['ms'] / ours:.2f}" if theirs and ours else "not measured"
