"""The settings that suit a machine, in three lines."""

from __future__ import annotations

from typing import Any

from nai_t5_core.bench.doctor.examination import Diagnosis
from nai_t5_core.bench.doctor.machine import CPU_KERNELS, INT8

_MUCH_FASTER = 1.5
# The share of a time from which on another way is advised: less may be chance.
_CLEARLY_FASTER = 0.9
# Beside the weights: activations, and the program itself.
_ROOM_BESIDE = 1.2


def advice(diagnosis: Diagnosis) -> list[str]:
    """Three lines: dtype and backend; quantisation; where to run a T5-XXL, or the model that was named.

    One line if the machine is not described. Results that are wrong are told in place of the first.
    """
    machine = diagnosis.data("machine")
    if not machine:
        return ["The machine could not be described; see the step that failed."]
    wrong = [name for name, outcome in diagnosis.outcomes.items() if outcome["status"] == "wrong"]
    first = _distrusting(wrong) if wrong else _computing(diagnosis, machine)
    return [first, _quantising(diagnosis, machine), _placing(machine)]


def _distrusting(steps: list[str]) -> str:
    return (
        f"Do not use what is computed here before this is cleared up: results of the step {' and '.join(steps)} are "
        "wrong (above). Please report it, with what nai-t5 doctor --json prints."
    )


def _computing(diagnosis: Diagnosis, machine: dict[str, Any]) -> str:
    by = f", by {found}" if (found := diagnosis.data("speed").get("by")) else ""
    text = f'Leave dtype="auto": it computes in {machine["dtype"]} here{by}.'
    if faster := _much_faster_dtype(diagnosis.data("ceilings").get("products", {}), machine["dtype"]):
        name, ratio = faster
        text = (
            f'dtype="auto" computes in {machine["dtype"]} here, and products in {name} are {ratio:.1f} times as fast: '
            f'if it fits, take dtype="{name}".'
        )
    if diagnosis.device == "cpu" and (reason := machine["missing"].get(CPU_KERNELS)):
        text += f" Our kernels for the CPU do not run here ({reason}); torch computes."
    if faster_way := _faster_than_auto(diagnosis.data("cpu-products").get("times", {})):
        way, shares = faster_way
        told = " and ".join(f"{share:.0%} for {length}" for length, share in shares.items())
        text += f' products="{way}" takes {told} tokens of that time here: name it.'
    return text


def _much_faster_dtype(rates: dict[str, Any], dtype: str) -> tuple[str, float] | None:
    """A dtype that is multiplied at more than half again the rate of this one, and how many times as fast it is.

    An older card may multiply float16 slowly, or only by emulation.
    """
    plain = {name: rates.get(name) for name in ("float32", "bfloat16", "float16")}
    known = {name: rate for name, rate in plain.items() if isinstance(rate, float)}
    if dtype not in known:
        return None
    fastest = max(known, key=lambda name: known[name])
    ratio = known[fastest] / known[dtype]
    return (fastest, ratio) if ratio > _MUCH_FASTER else None


def _faster_than_auto(times: dict[str, dict[str, Any]]) -> tuple[str, dict[str, float]] | None:
    """What multiplies clearly faster than what ``"auto"`` takes, at every length, and its shares of auto's times.

    The fastest of these; None if there is none.
    """
    by_auto = times.get("auto", {})
    shares = {
        way: {length: time["ms"] / by_auto[length]["ms"] for length, time in lengths.items()}
        for way, lengths in times.items()
        if by_auto
    }
    clearly = {way: each for way, each in shares.items() if max(each.values()) <= _CLEARLY_FASTER}
    if not clearly:
        return None
    fastest = min(clearly, key=lambda way: sum(clearly[way].values()))
    return fastest, clearly[fastest]


def _quantising(diagnosis: Diagnosis, machine: dict[str, Any]) -> str:
    if reason := machine["missing"].get(INT8):
        return f"Leave the weights as they are: {reason}."
    how_exact = "it is less exact, and nai-t5 parity --int8 says by how much for a model."
    if diagnosis.device != "cpu":
        return f'quantize="int8" halves the memory; its times here are those of the step int8-choice; {how_exact}'
    ours, theirs = (diagnosis.data(step).get("times", {}) for step in ("speed", "int8"))
    known = [length for length in ("64", "512") if length in ours and length in theirs]
    if not known:
        return f'quantize="int8" halves the memory; the step int8 says how fast it is here; {how_exact}'
    shares = (f"{theirs[length]['ms'] / ours[length]['ms']:.0%} for {length}" for length in known)
    return f'quantize="int8" halves the memory and takes {" and ".join(shares)} tokens of the time above; {how_exact}'


def _placing(machine: dict[str, Any]) -> str:
    card, model = machine["card"], machine["model"]
    room = (card or machine)["free_bytes"] or 0
    has = f"{card['name'] if card else 'memory'} has {_gigabytes(room)} to give"
    in_16_bits, in_8_bits = model["bytes_in_16_bits"], model["bytes_in_8_bits"]
    if (quantised := model.get("quantised_bytes")) and room > _ROOM_BESIDE * quantised:
        return f"{model['name']}, whose weights stay quantised ({_gigabytes(quantised)}), fits: {has}."
    if room > _ROOM_BESIDE * in_16_bits:
        return f"{model['name']} in 16 bits ({_gigabytes(in_16_bits)}) fits: {has}."
    if INT8 not in machine["missing"] and room > _ROOM_BESIDE * in_8_bits:
        return f'{model["name"]} needs quantize="int8" ({_gigabytes(in_8_bits)}) here: {has}.'
    too_small = f"{has}, and {model['name']} takes {_gigabytes(in_16_bits)} in 16 bits: "
    if card:
        return f"{too_small}load it with offload=True, which leaves its layers in the host's memory."
    return f"{too_small}use a smaller T5."


def _gigabytes(count: float) -> str:
    """Two digits, in megabytes where that is less than 0.1 GB."""
    if count < 1e8:
        return f"{count / 1e6:.2g} MB"
    return f"{count / 1e9:.2g} GB" if count < 1e10 else f"{count / 1e9:.0f} GB"
