"""The scripts of examples/, on tiny random pipelines of the real classes: two steps, to an image."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from PIL import Image
from toy_pipelines import NEGATIVE, PROMPT, Toy, make

from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel

pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE = {"height": 32, "width": 32}
EXAMPLES = {
    # toy: script, its function, what that takes beside the prompt, settings of the call
    "flux": ("flux", "paint", {}, SHAPE),
    "sd3": ("sd35", "paint", {"negative_prompt": NEGATIVE}, SHAPE),
    "pixart-sigma": ("pixart_sigma", "paint", {}, {**SHAPE, "use_resolution_binning": False}),
    "chroma": ("chroma", "paint", {"negative_prompt": NEGATIVE}, SHAPE),
    "wan": ("wan", "film", {"negative_prompt": NEGATIVE}, {**SHAPE, "num_frames": 5}),
}


def script(name: str) -> Any:
    return importlib.import_module(f"examples.{EXAMPLES[name][0]}")


def run(function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    return function(*arguments, num_inference_steps=2, generator=torch.Generator().manual_seed(0), **settings)


def pixels(images: Any) -> np.ndarray[Any, Any]:
    return np.asarray(images, dtype=np.int16)


def of_the_pipeline(toy: Toy, prompt: str, negative: dict[str, str], settings: dict[str, Any]) -> Any:
    """What the pipeline makes by itself, all lengths as its call has them."""
    result = run(toy.pipe, prompt, **negative, output_type="pil", **settings)
    return pixels(result.frames[0] if hasattr(result, "frames") else result.images[0])


@pytest.mark.parametrize("name", EXAMPLES)
def test_same_image_as_the_pipelines_own(name: str) -> None:
    _, function, negative, settings = EXAMPLES[name]
    toy = make(name)
    expected = of_the_pipeline(toy, PROMPT, negative, settings)
    other = of_the_pipeline(toy, "blue snow", negative, settings)
    made = pixels(run(getattr(script(name), function), toy.pipe, PROMPT, **negative, **settings))
    assert isinstance(toy.encoder, NAIT5EncoderModel)
    assert made.shape == expected.shape and made.std() > 1
    assert np.abs(made - expected).max() <= 1, "a last bit may be rounded otherwise"
    assert np.abs(made - other).max() > 1, "the prompt does not matter here"


def test_emphasis_changes_the_image() -> None:
    images = []
    for emphasis in ("", "fox"):
        toy = make("pixart-sigma")
        settings = EXAMPLES["pixart-sigma"][3]
        images.append(pixels(run(script("pixart-sigma").paint, toy.pipe, PROMPT, emphasis, **settings)))
    assert np.abs(images[0] - images[1]).max() > 1


@pytest.mark.parametrize("name", EXAMPLES)
def test_main_loads_a_model_and_writes_a_file(name: str, tmp_path: Path) -> None:
    toy = make(name)
    toy.pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / ("out.gif" if name == "wan" else "out.png")
    size = {**SHAPE, "frames": 5} if name == "wan" else {"size": 32}
    script(name).main(prompt=PROMPT, model=str(tmp_path / "model"), out=out, steps=2, **size)
    with Image.open(out) as image:
        assert (image.width, image.height) == (32, 32)
        assert getattr(image, "n_frames", 1) == (5 if name == "wan" else 1)
