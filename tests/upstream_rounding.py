"""Those of diffusers' own tests that pass or fail by how the text encoder's last bits happen to be rounded.

A test stands here only if it was shown to fail with transformers' own encoder as well, when its results are changed by
less than its own rounding error; docs/diffusers.md has the figures. What it compares must also be within what was seen
with theirs: a failure beyond that has another cause, and is a fault like any other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# The full name of a test, and how it ended: ``passed``, ``skipped``, or ``failure: …`` or ``error: …`` with the reason.
Outcomes = dict[str, str]

# Both ways in which those tests say what they have measured: by assert, and by unittest's assertLess.
_MEASURED = re.compile(r"failure: (?:AssertionError: )?(?:assert )?np\.float32\(([\d.e+-]+)\) (?:<|not less than) ")


@dataclass(frozen=True)
class Rounding:
    """The largest difference seen with transformers' encoder and changed last bits, and why rounding decides."""

    largest: float
    why: str


DECIDED_BY_ROUNDING: dict[str, Rounding] = {
    "tests.pipelines.kandinsky3.test_kandinsky3_img2img."
    "Kandinsky3Img2ImgPipelineFastTests::test_save_load_local": Rounding(
        6.9e-4,
        "the VQ model is compared in training mode and, loaded, in evaluation mode, whose sums have another order",
    ),
    "tests.pipelines.skyreels_v2.test_skyreels_v2_df_video_to_video."
    "SkyReelsV2DiffusionForcingVideoToVideoPipelineFastTests::test_inference_batch_single_identical": Rounding(
        1.7e-4,
        "a convolution rounds one video otherwise than a batch of three, and what follows enlarges that",
    ),
}


def lost_to_rounding(outcomes: Outcomes) -> list[str]:
    """The tests that failed, and that rounding decides."""
    return [test for test, outcome in outcomes.items() if _is_rounding(test, outcome)]


def explain_rounding(outcomes: Outcomes, encoder: str) -> list[str]:
    """A line for each of these: neither a pass nor a fault, and why."""
    return [
        f"failed with {encoder}, decided by rounding: {test} ({outcomes[test]}); {DECIDED_BY_ROUNDING[test].why}"
        for test in lost_to_rounding(outcomes)
    ]


def _is_rounding(test: str, outcome: str) -> bool:
    measured = _MEASURED.match(outcome)
    known = DECIDED_BY_ROUNDING.get(test)
    return known is not None and measured is not None and float(measured[1]) <= known.largest
