"""The settings that suit a machine, in three lines."""

from __future__ import annotations

from typing import Any

from nai_t5_core.bench.doctor.examination import Diagnosis

_MUCH_FASTER = 1.5
_XXL_BYTES_16_BIT, _XXL_BYTES_8_BIT = 9.5e9, 4.8e9


def advice(diagnosis: Diagnosis) -> list[str]:
    """Three lines: dtype and backend; quantisation; where to run a T5-XXL. One line if the machine is not described."""
    machine = diagnosis.data("machine")
    if not machine:
        return ["The machine could not be described; see the step that failed."]
    return [_computing(diagnosis, machine), _quantising(diagnosis.device, machine), _placing(machine)]


def _computing(diagnosis: Diagnosis, machine: dict[str, Any]) -> str:
    by = f", by {found}" if (found := diagnosis.data("speed").get("by")) else ""
    text = f'Leave dtype="auto": it computes in {machine["dtype"]} here{by}.'
    if faster := _much_faster_dtype(diagnosis.data("ceilings").get("products", {}), machine["dtype"]):
        name, ratio = faster
        text = (
            f'dtype="auto" computes in {machine["dtype"]} here, and products in {name} are {ratio:.1f} times as fast: '
            f'if it fits, take dtype="{name}".'
        )
    if diagnosis.device == "cpu" and (reason := machine["missing"].get("kernels")):
        text += f" The kernels do not run here ({reason}); torch computes."
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


def _quantising(device: str, machine: dict[str, Any]) -> str:
    if reason := machine["missing"].get("int8"):
        return f"Leave the weights as they are: {reason}."
    if device != "cpu":
        return (
            'quantize="int8" halves the memory; its times here are those of the step 8-bit-speed of --full, and '
            "nai-t5 parity --int8 says how large its error is for a model."
        )
    return (
        'quantize="int8" halves the memory and is faster, at an error some times that of bfloat16; '
        "nai-t5 parity --int8 says how large it is for a model."
    )


def _placing(machine: dict[str, Any]) -> str:
    card = machine["card"]
    room = (card or machine)["free_bytes"] or 0
    what = card["name"] if card else "memory"
    if room > 1.2 * _XXL_BYTES_16_BIT:
        return f"A T5-XXL in 16 bits (9.5 GB) fits: {what} has {room / 1e9:.0f} GB to give."
    if "int8" not in machine["missing"] and room > 1.2 * _XXL_BYTES_8_BIT:
        return f'A T5-XXL needs quantize="int8" (4.8 GB) here: {what} has {room / 1e9:.0f} GB to give.'
    too_small = f"{what} has {room / 1e9:.0f} GB to give, and a T5-XXL takes 9.5 in 16 bits: "
    if card:
        return f"{too_small}load it with offload=True, which leaves its layers in the host's memory."
    return f"{too_small}use a smaller T5."
