"""Keeps what was measured on a card in the file that an automatic choice reads."""

from __future__ import annotations

import json
from typing import Any

from nai_t5_core.backends.cuda.card import Card
from nai_t5_core.backends.cuda.measured_card import NEVER, MeasuredCard, MeasuredInt8, measured_file, read_measured
from nai_t5_core.bench.doctor.examination import Diagnosis
from nai_t5_core.weights.whole_files import write_whole

# Both have to be right for what suits int8 to be kept.
_OF_INT8 = ("8-bits", "int8-choice")


def flex_from_lengths(times: dict[str, Any]) -> int | None:
    """From how many lengths in a batch on flex is faster than SDPA, by the times of the step ``flex``.

    Between two numbers of lengths that were timed it is the mean in ratio; None where nothing was timed.
    """
    lengths = {name: int(name.split()[0]) for name in times if name.endswith("prompts")}
    slower, faster = 1, None
    for name, count in sorted(lengths.items(), key=lambda item: item[1]):
        if times[name]["flex"]["ms"] >= times[name]["sdpa"]["ms"]:
            slower, faster = count, None
        elif faster is None:
            faster = count
    if not lengths:
        return None
    return NEVER if faster is None else max(2, round((slower * faster) ** 0.5))


def write_choice(diagnosis: Diagnosis) -> str | None:
    """Writes what was measured, where all results of the kernels were right; what was done, as a sentence.

    None where the step ``choice`` measured nothing. Flex and int8 are not timed every time: what an earlier examination
    found of them stays. What was found of int8 is kept only where its results were right, too.
    """
    if not (found := diagnosis.data("choice")):
        return None
    steps = _statuses(diagnosis, "kernels", "choice")
    if any(status != "ok" for status in steps.values()):
        return f"What is fastest on this card was not kept, since the results have to be right first ({_told(steps)})."
    measured = MeasuredCard.model_validate_json(json.dumps(found["measured"]))
    card = Card(measured.card, measured.architecture)
    before, flex = read_measured(card), diagnosis.data("flex")
    lengths = before and before.flex_from_lengths
    if flex and not flex.get("wrong"):
        lengths = flex_from_lengths(flex["times"])
    measured = measured.model_copy(update={"flex_from_lengths": lengths, "int8": _int8(diagnosis, before)})
    path = measured_file(card)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, measured.model_dump_json(indent=1) + "\n")
    except OSError as error:
        return f"What is fastest on this card could not be kept in {path}: {error.strerror or error}."
    kept = f"What is fastest on this card is kept in {path}; encoders that are loaded from now on use it."
    return kept + _of_int8_in_words(diagnosis)


def _int8(diagnosis: Diagnosis, before: MeasuredCard | None) -> MeasuredInt8 | None:
    """What is to be kept of the step ``int8-choice``; what was kept before, unless that was found to be wrong now."""
    statuses = _statuses(diagnosis, *_OF_INT8)
    found = diagnosis.data("int8-choice").get("measured")
    if found and all(status == "ok" for status in statuses.values()):
        return MeasuredInt8.model_validate_json(json.dumps(found))
    return None if before is None or "wrong" in statuses.values() else before.int8


def _of_int8_in_words(diagnosis: Diagnosis) -> str:
    """What became of the step ``int8-choice`` where it is not kept."""
    statuses = _statuses(diagnosis, *_OF_INT8)
    if "measured" not in diagnosis.data("int8-choice") or all(status == "ok" for status in statuses.values()):
        return ""
    return f" Nothing of int8 was kept, since its results have to be right first ({_told(statuses)})."


def _statuses(diagnosis: Diagnosis, *steps: str) -> dict[str, str]:
    return {step: str(diagnosis.outcomes.get(step, {}).get("status", "not run")) for step in steps}


def _told(statuses: dict[str, str]) -> str:
    return ", ".join(f"{name}: {status}" for name, status in statuses.items())
