"""Diffusers' own fast pipeline tests, run with its T5 and then with our encoder in the same places. Run by hand:

    python tests/upstream_diffusers.py CHECKOUT [--family flux --family wan]

CHECKOUT is a work tree of the diffusers repository. Its own library is tested, or the installed one where the work tree
has no ``src`` (``git sparse-checkout set tests``). The packages parameterized and requests_mock must be installed.

Nothing is downloaded: the tests ask the hub for tiny random models, and get tiny random ones of the same kinds from a
local folder that is laid out as the hub's cache and written anew for each run. Tests that compare with numbers of the
hub's weights fail with both encoders.

What passes with theirs and not with ours is printed, and the exit status is 1 then.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated
from xml.etree import ElementTree

import typer
from upstream_hub import write_hub

TESTS = Path(__file__).parent
Outcomes = dict[str, str]

# Test files of each family, below tests/pipelines.
FAMILIES = {
    "flux": "flux/test_pipeline_flux.py flux/test_pipeline_flux_img2img.py flux/test_pipeline_flux_fill.py",
    "sd3": "stable_diffusion_3/test_pipeline_stable_diffusion_3.py",
    "pixart-sigma": "pixart_sigma/test_pixart.py",
    "pixart-alpha": "pixart_alpha/test_pixart.py",
    "chroma": "chroma/test_pipeline_chroma.py chroma/test_pipeline_chroma_img2img.py",
    "auraflow": "aura_flow/test_pipeline_aura_flow.py",
    "wan": "wan/test_wan.py wan/test_wan_22.py wan/test_wan_video_to_video.py",
    "ltx-video": "ltx/test_ltx.py ltx/test_ltx_image2video.py",
    "ltx-condition": "ltx/test_ltx_condition.py",
    "mochi": "mochi/test_mochi.py",
    "cogvideox": "cogvideo/test_cogvideox.py",
    "cogview3plus": "cogview3/test_cogview3plus.py",
    "latte": "latte/test_latte.py",
    "allegro": "allegro/test_allegro.py",
    "hunyuandit": "hunyuandit/test_hunyuan_dit.py",
    "kandinsky3": "kandinsky3/test_kandinsky3.py",
    "cosmos": "cosmos/test_cosmos2_text2image.py",
    "skyreels-v2": "skyreels_v2/test_skyreels_v2.py",
    "bria": "bria/test_pipeline_bria.py",
    "visualcloze": "visualcloze/test_pipeline_visualcloze_combined.py "
    "visualcloze/test_pipeline_visualcloze_generation.py",
    "hidream": "hidream_image/test_pipeline_hidream.py",
    "deepfloyd-if": "deepfloyd_if/test_if.py deepfloyd_if/test_if_img2img.py deepfloyd_if/test_if_inpainting.py "
    "deepfloyd_if/test_if_superresolution.py",
    "helios": "helios/test_helios.py",
    "hunyuanimage": "hunyuan_image_21/test_hunyuanimage.py",
    "hunyuanvideo-1.5": "hunyuan_video1_5/test_hunyuan_1_5.py",
    "stable-audio": "stable_audio/test_stable_audio.py",
    "audioldm2": "audioldm2/test_audioldm2.py",
    "longcat-audiodit": "longcat_audio_dit/test_longcat_audio_dit.py",
}


def main(
    checkout: Annotated[Path, typer.Argument(help="a work tree of the diffusers repository", exists=True)],
    family: Annotated[list[str] | None, typer.Option(help="one of the families; all, if none is given")] = None,
) -> None:
    """Prints a Markdown table of what passes with both encoders."""
    unknown = set(family or ()) - set(FAMILIES)
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known: {', '.join(FAMILIES)}")
    lost: list[str] = []
    print("| family | passed with theirs | passed with ours | passed with one only |\n|---|---|---|---|", flush=True)
    with TemporaryDirectory() as hub:
        write_hub(Path(hub))
        for name in family or FAMILIES:
            stock, ours = (run(checkout, FAMILIES[name].split(), Path(hub), swap) for swap in (False, True))
            lost += lost_tests(stock, ours)
            print(f"| {name} | {passed(stock)} | {passed(ours)} | {difference(stock, ours)} |", flush=True)
    for test in lost:
        print(f"passes with theirs only: {test}")
    raise typer.Exit(1 if lost else 0)


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
    """Full test names and ``passed``, ``failure``, ``error`` or ``skipped``, from a JUnit file."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        tags = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = tags[0] if tags else "passed"
    return outcomes


def passed(outcomes: Outcomes) -> int:
    return sum(outcome == "passed" for outcome in outcomes.values())


def lost_tests(stock: Outcomes, ours: Outcomes) -> list[str]:
    """What passes with theirs and not with ours; a test that did not run at all is among it."""
    return [f"{test} ({ours.get(test)})" for test in stock if stock[test] == "passed" != ours.get(test)]


def difference(stock: Outcomes, ours: Outcomes) -> str:
    gained = lost_tests(ours, stock)
    lost = lost_tests(stock, ours)
    return "none" if not gained and not lost else f"theirs {len(lost)}, ours {len(gained)}"


if __name__ == "__main__":
    typer.run(main)
