"""Diffusers' own fast pipeline tests, run with its T5 and then with our encoder in the same places. Run by hand:

    python tests/upstream_diffusers.py CHECKOUT [--folder flux --folder wan]

CHECKOUT is a work tree of the diffusers repository. Its own library is tested, or the installed one where the work tree
has no ``src`` (``git sparse-checkout set tests``). The packages parameterized, requests_mock and opencv-python-headless
must be installed; some tests of Cosmos need torchvision. Every file below tests/pipelines that makes a T5 is run.

Nothing is downloaded: the tests ask the hub for tiny random models, and get tiny random ones of the same kinds from a
local folder that is laid out as the hub's cache and written anew for each run. Tests that compare with numbers of the
hub's weights fail with both encoders.

The exit status is 1 if a test passes with theirs and not with ours, and if fewer pass with theirs than are known to:
what fails with both tells nothing. Either is printed. A failure that rounding decides (``upstream_rounding.py``) is
printed as that: it is no pass, and does not change the status.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated
from xml.etree import ElementTree

import typer
from upstream_hub import write_hub
from upstream_rounding import Outcomes, explain_rounding, lost_to_rounding

TESTS = Path(__file__).parent

_MAKES_A_T5 = re.compile(r"\b(T5|MT5|UMT5)(EncoderModel|ForConditionalGeneration)\b")

# How many tests of each folder pass with theirs, those of diffusers 0.42.1, with transformers 5.23 and 5.24, on a CPU.
KNOWN: dict[str, int] = {
    "allegro": 22,
    "anyflow": 43,
    "audioldm2": 26,
    "aura_flow": 23,
    "bria": 20,
    "chroma": 54,
    "chronoedit": 21,
    "cogvideo": 78,
    "cogview3": 22,
    "consisid": 24,
    "controlnet_flux": 75,
    "controlnet_hunyuandit": 23,
    "controlnet_sd3": 44,
    "cosmos": 43,
    "deepfloyd_if": 126,
    "flux": 279,
    "glm_image": 0,
    "helios": 20,
    "hidream_image": 22,
    "hunyuan_image_21": 25,
    "hunyuan_video1_5": 19,
    "hunyuandit": 23,
    "kandinsky3": 45,
    "latte": 25,
    "longcat_audio_dit": 23,
    "ltx": 73,
    "mochi": 28,
    "pag": 98,
    "pixart_alpha": 23,
    "pixart_sigma": 23,
    "skyreels_v2": 109,
    "stable_audio": 28,
    "stable_diffusion_3": 74,
    "visualcloze": 46,
    "wan": 169,
}


def main(
    checkout: Annotated[Path, typer.Argument(help="a work tree of the diffusers repository", exists=True)],
    folder: Annotated[list[str] | None, typer.Option(help="one below tests/pipelines; all, if none is given")] = None,
) -> None:
    """Prints a Markdown table of what passes with both encoders."""
    files = files_with_a_t5(checkout)
    unknown = set(folder or ()) - set(files)
    if unknown:
        raise typer.BadParameter(f"nothing makes a T5 in: {', '.join(unknown)}; but in: {', '.join(files)}")
    notes: list[str] = []
    faults = [] if folder else [f"{name}: no test makes a T5 any more" for name in KNOWN if name not in files]
    print("| folder | passed with theirs | passed with ours | passed with one only |\n|---|---|---|---|", flush=True)
    with TemporaryDirectory() as hub:
        write_hub(Path(hub))
        for name in folder or files:
            stock, ours = (run(checkout, files[name], Path(hub), swap) for swap in (False, True))
            print(f"| {name} | {passed(stock)} | {passed(ours)} | {difference(stock, ours)} |", flush=True)
            faults += too_few(name, stock) + faults_of_ours(stock, ours)
            notes += [*explain_rounding(stock, "theirs"), *explain_rounding(ours, "ours")]
    print("\n".join(notes + faults))
    raise typer.Exit(1 if faults else 0)


def files_with_a_t5(checkout: Path) -> dict[str, list[str]]:
    """The test files that make a T5, by their folder, as paths below tests/pipelines.

    Where a package makes the parts for all of its tests, these are all of its test files.
    """
    pipelines = checkout / "tests" / "pipelines"
    found: dict[str, list[str]] = {}
    for file in sorted(pipelines.glob("*/test_*.py")):
        if any(_MAKES_A_T5.search(source.read_text()) for source in (file, file.parent / "__init__.py")):
            found.setdefault(file.parent.name, []).append(f"{file.parent.name}/{file.name}")
    return found


def too_few(folder: str, stock: Outcomes) -> list[str]:
    """What is wrong with a run of their encoder: that fewer tests pass than are known to, or that none are known.

    A test that rounding made fail is not missed.
    """
    if folder not in KNOWN:
        return [f"{folder}: {passed(stock)} pass with theirs; write that down in KNOWN"]
    if passed(stock) + len(lost_to_rounding(stock)) >= KNOWN[folder]:
        return []
    failed = [f"{test} ({outcome})" for test, outcome in stock.items() if outcome.startswith(("failure", "error"))]
    return [f"{folder}: {passed(stock)} pass with theirs, {KNOWN[folder]} are known to; see {'; '.join(failed)}"]


def run(checkout: Path, files: list[str], hub: Path, swap: bool) -> Outcomes:
    """The outcome of each test of the files, by its full name.

    Raises:
        RuntimeError: pytest could not collect the files; its output is in the message.
    """
    report = hub / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-p", "upstream_swap"] if swap else []
    command += [f"tests/pipelines/{file}" for file in files]
    paths = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # all passed, some failed
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}")
    return read_report(report)


def read_report(report: Path) -> Outcomes:
    """Full test names and ``passed``, ``skipped``, ``failure: …`` or ``error: …``, from a JUnit file.

    What follows the colon is the first line of what went wrong.
    """
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        ends = [child for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = _outcome(ends[0]) if ends else "passed"
    return outcomes


def _outcome(end: ElementTree.Element) -> str:
    return end.tag if end.tag == "skipped" else f"{end.tag}: {end.get('message', '').partition(chr(10))[0]}"


def passed(outcomes: Outcomes) -> int:
    return sum(outcome == "passed" for outcome in outcomes.values())


def lost_tests(stock: Outcomes, ours: Outcomes) -> list[str]:
    """What passes with theirs and not with ours; a test that did not run at all is among it."""
    return [test for test in stock if stock[test] == "passed" != ours.get(test)]


def faults_of_ours(stock: Outcomes, ours: Outcomes) -> list[str]:
    """What passes with theirs and not with ours, without what rounding decides."""
    by_rounding = lost_to_rounding(ours)
    return [
        f"passes with theirs only: {test} ({ours.get(test)})"
        for test in lost_tests(stock, ours)
        if test not in by_rounding
    ]


def difference(stock: Outcomes, ours: Outcomes) -> str:
    gained = lost_tests(ours, stock)
    lost = lost_tests(stock, ours)
    return "none" if not gained and not lost else f"theirs {len(lost)}, ours {len(gained)}"


if __name__ == "__main__":
    typer.run(main)
