"""What is fastest on a card, as parts of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nai_t5_core.backends.cuda.measured_card import NEVER
from nai_t5_core.bench.doctor.section import Section

_HEAD = ("what", "by", "time", "by torch")


def choice(found: dict[str, Any]) -> Section:
    """See :func:`nai_t5_core.bench.doctor.choosing.measure_choice`."""
    measured = found["measured"]
    rows = [_product(each) for each in measured["products"]]
    for each in measured["attention"]:
        how = f"queries {each['queries']} keys {each['keys']} warps {each['warps']} stages {each['stages']}"
        rows.append((f"attention, {each['tokens']} tokens", how, f"{each['microseconds']:.1f} µs", ""))
    lines = list(_layers(found["times"]))
    if rows_that_overlap := measured.get("overlapping_rows"):
        lines.append(f"launches overlap up to {rows_that_overlap} tokens, where layers are faster so")
    lines += _lengths(found)
    return Section("What is fastest on this card, in a layer of a T5-XXL", _HEAD, tuple(rows), tuple(lines))


def int8_choice(found: dict[str, Any]) -> Section:
    """See :func:`nai_t5_core.bench.doctor.int8_inputs.measure_int8_choice`."""
    measured = found["measured"]
    lines = list(_layers(found["times"]))
    if measured["inputs_from"] == NEVER:
        lines.append("layers are not faster with inputs in 8 bits")
    else:
        lines.append(f"layers are faster with inputs in 8 bits from {measured['inputs_from']} tokens on")
    if rows_that_overlap := measured["overlapping_rows"]:
        lines.append(f"their launches overlap up to {rows_that_overlap} tokens, where layers are faster so")
    rows = tuple(_product(each) for each in measured["products"])
    title = 'The same with quantize="int8": products with inputs in 8 bits too'
    lines += _lengths(found)
    if reason := found.get("no_lengths"):
        lines.append(f"the model was not timed: {reason}")
    return Section(title, _HEAD, rows, tuple(lines))


def _product(each: Mapping[str, Any]) -> tuple[str, ...]:
    how = " ".join((each["way"], *(f"{name} {number}" for name, number in each["configuration"].items())))
    name = f"{each['kind']} products, {each['rows']} rows"
    return name, how, f"{each['microseconds']:.1f} µs", f"{each['by_torch']:.1f} µs"


def _layers(times: Mapping[str, Mapping[str, float]]) -> Iterable[str]:
    for rows, time_of in times.items():
        yield f"layers at {rows} tokens: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in time_of.items())


def _lengths(found: Mapping[str, Any]) -> Iterable[str]:
    if lengths := found.get("lengths"):
        yield "the timed model: " + ", ".join(f"{tokens} tokens {ms:.2f} ms" for tokens, ms in lengths.items())
