"""The diagnosis as text: for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nai_t5_core.bench.doctor.advice import advice
from nai_t5_core.bench.doctor.choice_sections import choice, int8_choice
from nai_t5_core.bench.doctor.examination import Diagnosis
from nai_t5_core.bench.doctor.first_encode import MOST_SECONDS
from nai_t5_core.bench.doctor.goals import goals, least_ms
from nai_t5_core.bench.doctor.profiles import by_products, by_products_in_8_bits, where_time_goes
from nai_t5_core.bench.doctor.section import Section

if TYPE_CHECKING:
    from rich.console import RenderableType

_MOST_FAULTS = 12  # of one step, in words
_PICTURE_COLUMNS = 120

_LEFT_OUT = {"status": "left out"}
_WAS_BUSY = "More than 100%: something else kept the machine busy while its limits were measured. Run it again."
_NO_ADVICE = "None without the step machine, which did not run."

# Steps that time compiled encoders, and the titles of their tables.
_COMPILED = {
    "compiled": "Ours, compiled",
    "compiled-512": "Ours, compiled for 512 tokens",
    "peers-compiled": "transformers, compiled",
    "nai-t5-compiled": "nai-t5 by flex, compiled",
}


def render(diagnosis: Diagnosis) -> RenderableType:
    """The diagnosis for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for section in _sections(diagnosis):
        if section.head:
            table = Table(*section.head, title=section.title, title_justify="left")
            for row in section.rows:
                table.add_row(*map(Text, row))
            parts.append(table)
        else:
            parts.append(Text(section.title, style="bold"))
        parts += map(Text, section.lines)
    return Group(*parts)


def as_svg(diagnosis: Diagnosis) -> str:
    """The diagnosis as a picture of a terminal."""
    import io
    import re

    from rich.console import Console

    console = Console(record=True, width=_PICTURE_COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(render(diagnosis))
    # Without the fonts that rich has a viewer fetch from the web: any monospaced one does.
    return re.sub(r"@font-face {.*?}", "", console.export_svg(title="nai-t5 doctor"), flags=re.DOTALL)


def as_markdown(diagnosis: Diagnosis) -> str:
    """The diagnosis as Markdown."""
    lines = []
    for section in _sections(diagnosis):
        lines += [f"**{section.title}**", ""]
        if section.head:
            lines += ["| " + " | ".join(section.head) + " |", "|" + "---|" * len(section.head)]
            lines += ["| " + " | ".join(row) + " |" for row in section.rows] + [""]
        lines += [f"- {line}" for line in section.lines] + ([""] if section.lines else [])
    return "\n".join(lines)


def _sections(diagnosis: Diagnosis) -> Iterator[Section]:
    if machine := diagnosis.data("machine"):
        yield _machine(machine)
    if ceilings := diagnosis.data("ceilings"):
        yield _ceilings(ceilings)
    yield _steps(diagnosis)
    if any(diagnosis.data(step) for step in ("speed", "batches")):
        yield _speed(diagnosis)
    if (times := diagnosis.data("int8").get("times")) and (above := diagnosis.data("speed").get("times")):
        yield _int8(times, above)
    if found := diagnosis.data("launches"):
        yield where_time_goes(found)
    if found := diagnosis.data("cpu-products"):
        yield _cpu_products(found)
    for step in ("transformers", "nai-t5"):
        if found := diagnosis.data(step):
            yield _peer(step, found)
    if found := diagnosis.data("first-encode"):
        yield _first_encode(found)
    if found := diagnosis.data("choice"):
        yield choice(found)
    if "measured" in (found := diagnosis.data("int8-choice")):
        yield int8_choice(found)
    if found := diagnosis.data("kernel-speed"):
        yield _kernels("Our kernels for CUDA", found)
    if found := diagnosis.data("8-bit-speed"):
        yield _kernels("Weights in 8 bits by our kernels for CUDA", found)
    if found := diagnosis.data("products"):
        yield by_products(found)
    if found := diagnosis.data("8-bit-products"):
        yield by_products_in_8_bits(found)
    if found := diagnosis.data("memory"):
        yield _memory(found)
    if found := diagnosis.data("offload"):
        yield _offload(found)
    if flex := diagnosis.data("flex"):
        yield _flex(flex)
    for step, title in _COMPILED.items():
        if found := diagnosis.data(step):
            yield _compiled(title, found)
    if reached := tuple(goals(diagnosis)):
        yield Section("To reach on an H100", ("what", "goal", "found"), reached)
    was_described = diagnosis.outcomes.get("machine", _LEFT_OUT)["status"] != "left out"
    yield Section("Advice", lines=tuple(advice(diagnosis)) if was_described else (_NO_ADVICE,))


def _machine(machine: dict[str, Any]) -> Section:
    card = machine["card"]
    rows = [
        (
            "processor",
            f"{machine['processor']}, {_counted(machine['cores'], 'core')}, {_counted(machine['threads'], 'thread')}",
        ),
        ("instructions", " ".join(machine["instruction_sets"])),
        ("memory", f"{_size(machine['free_bytes'])} free of {_size(machine['memory_bytes'])}"),
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())),
        ("compilers", ", ".join(machine["compilers"]) or "none"),
    ]
    if card:
        what = card.get("architecture") if card.get("hip") else f"compute capability {card['capability']}"
        rows.insert(0, ("card", f"{card['name']}, {what}, driver {card['driver']}"))
        rows.insert(1, ("its memory", f"{_size(card['free_bytes'])} free of {_size(card['memory_bytes'])}"))
    if card and "choice" in card:
        rows.insert(2, ("products and attention", card["choice"]))
    rows += [(f"no {name}", reason) for name, reason in machine["missing"].items()]
    return Section("The machine", ("", "what there is"), tuple(rows))


def _offload(found: dict[str, Any]) -> Section:
    rows = [
        (f"{tokens} tokens, {kind}", f"{each['ms']:.1f} ms", f"{each['times the bus']:.2f}")
        for kind, measured in found["kinds"].items()
        for tokens, each in measured["times"].items()
    ]
    lines = [
        f"In {kind} the bus takes {each['bus_ms']:.1f} ms for {each['bytes'] / 1e9:.2f} GB, and the card gives "
        f"{each['device_bytes'] / 1e9:.2f} GB."
        for kind, each in found["kinds"].items()
    ]
    lines.append(f"An encode is to take at most {found['target']} times as long as the bus.")
    return Section("Layers from the host's memory", ("batch", "an encode", "times the bus"), tuple(rows), tuple(lines))


def _ceilings(ceilings: dict[str, Any]) -> Section:
    rows = [
        ("reading memory", f"{ceilings['read_bytes_per_second'] / 1e9:.0f} GB/s"),
        ("copying memory, read and written", f"{ceilings['copy_bytes_per_second'] / 1e9:.0f} GB/s"),
    ]
    for name, rate in ceilings["products"].items():
        rows.append(
            (f"products of matrices in {name}", rate if isinstance(rate, str) else f"{rate / 1e12:.2f} T operations/s")
        )
    return Section("What the machine does at most", ("", "measured"), tuple(rows))


def _steps(diagnosis: Diagnosis) -> Section:
    rows, lines = [], [_verdict(diagnosis)]
    for name, outcome in diagnosis.outcomes.items():
        data = outcome.get("data", {})
        told = f"{data['checked']} results checked" if "checked" in data else data.get("reason", "")
        rows.append((name, outcome["title"], outcome["status"], f"{outcome['seconds']:.1f} s", told))
        if message := outcome.get("message"):
            lines.append(f"{name}: {message}")
        faults = data.get("wrong", [])
        lines += [f"{name}: {fault}" for fault in faults[:_MOST_FAULTS]]
        if len(faults) > _MOST_FAULTS:
            lines.append(f"{name}: and {len(faults) - _MOST_FAULTS} more")
    return Section("What was done", ("step", "what", "outcome", "time", ""), tuple(rows), tuple(lines))


def _verdict(diagnosis: Diagnosis) -> str:
    """How many results were checked, and how many of them are wrong."""
    found = [outcome.get("data", {}) for outcome in diagnosis.outcomes.values()]
    checked = sum(each.get("checked", 0) for each in found)
    wrong = sum(len(each.get("wrong", [])) for each in found)
    if wrong:
        return f"{_counted(wrong, 'result')} wrong, of {checked} that were checked:"
    return f"{checked} results were checked, and all are right." if checked else "No results were checked."


def _speed(diagnosis: Diagnosis) -> Section:
    ceilings, on_cpu = diagnosis.data("ceilings"), diagnosis.device == "cpu"
    rows, about, shares = [], {}, list[float]()
    for step in ("speed", "batches"):
        if found := diagnosis.data(step):
            about = found
            for name, time in found["times"].items():
                least = least_ms(time["work"], ceilings, found["dtype"])
                what = f"{name} tokens" if step == "speed" else f"{name}, pads skipped"
                shares += [least / time["ms"]] if least else []
                told = f"{least:.2f} ms, {shares[-1]:.0%} of the time" if least else ""
                host = () if on_cpu else (f"{time['host_ms']:.2f} ms",)
                rows.append((what, f"{time['ms']:.2f} ms", *host, told))
    title = f"Our encoder: {about['words']}, in {about['dtype']}, by {about['by']}"
    head = ("batch", "time", *(() if on_cpu else ("of it the host's",)), "least that this machine allows")
    return Section(title, head, tuple(rows), (_WAS_BUSY,) if max(shares, default=0) > 1 else ())


def _int8(times: dict[str, Any], by_16_bits: dict[str, Any]) -> Section:
    rows = [
        (f"{length} tokens", f"{time['ms']:.2f} ms", f"{time['ms'] / by_16_bits[length]['ms']:.0%}")
        for length, time in times.items()
        if length in by_16_bits
    ]
    return Section('Our encoder with quantize="int8"', ("batch", "time", "of the time above"), tuple(rows))


def _cpu_products(found: dict[str, Any]) -> Section:
    rows = [
        (f'products="{way}"', found["by"][way], *(f"{time['ms']:.2f} ms" for time in times.values()))
        for way, times in found["times"].items()
    ]
    lengths: dict[str, Any] = next(iter(found["times"].values()), {})
    return Section("What may multiply here", ("", "by", *(f"{length} tokens" for length in lengths)), tuple(rows))


def _peer(name: str, found: dict[str, Any]) -> Section:
    rows = []
    parts = [found] + ([found["in float32"]] if "in float32" in found else [])
    for part in parts:
        for case, times in part["times"].items():
            theirs = f"{times[name]['ms']:.2f} ms in {part['dtype']}"
            rows.append(
                (case, theirs, f"{times['ours']['ms']:.2f} ms", f"{times['ratio']:.2f}×", f"{times['differs']:.1e}")
            )
    return Section(f"{name} beside ours", ("tokens", name, "ours", "ratio", "largest difference"), tuple(rows))


def _first_encode(found: dict[str, Any]) -> Section:
    rows = [
        (name, *(f"{times[each]:.2f} s" for each in ("start_seconds", "first_seconds", "second_seconds")))
        for name, times in found["times"].items()
    ]
    line = f"Start and first encode are to take at most {MOST_SECONDS:.0f} s, and take {found['seconds']:.1f} s."
    return Section("A fresh process", ("", "start and imports", "first encode", "second"), tuple(rows), (line,))


def _memory(found: dict[str, Any]) -> Section:
    figures = ("most_at_load", "kept_bytes", "most_while_encoding", "reserved_bytes")
    rows = [
        (kind, f"{each['load_seconds']:.1f} s", *(f"{each[name] / 1e9:.2f} GB" for name in figures))
        for kind, each in found["kinds"].items()
    ]
    head = ("", "loading", "most while loading", "what stays", "most while encoding", "taken by torch")
    return Section(f"What {found['model']} takes of the card", head, tuple(rows))


def _flex(flex: dict[str, Any]) -> Section:
    timed = {name: times for name, times in flex["times"].items() if isinstance(times["sdpa"], dict)}
    ways = list(next(iter(timed.values())))
    rows = [(name, *(f"{times[way]['ms']:.2f} ms" for way in ways)) for name, times in timed.items()]
    return Section("Attention", ("tokens", *ways), tuple(rows))


def _kernels(title: str, found: dict[str, Any]) -> Section:
    variants = list(next(iter(found["times"].values())))
    rows = [(name, *(f"{times[each]['ms']:.2f} ms" for each in variants)) for name, times in found["times"].items()]
    lines = tuple(f"{name}: {_size(count)} of weights" for name, count in found.get("bytes", {}).items())
    return Section(title, ("tokens", *variants), tuple(rows), lines)


def _compiled(title: str, found: dict[str, Any]) -> Section:
    rows = [
        (name, f"{times['ms']:.2f} ms", f"{times['host_ms']:.2f} ms", f"{times['first_seconds']:.1f} s")
        for name, times in found["times"].items()
    ]
    return Section(title, ("tokens", "time", "of it the host's", "first call"), tuple(rows))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _size(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else f"{nbytes / 1e9:.1f} GB"
