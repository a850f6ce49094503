"""How a T5 fares in float16, as a table and a picture."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nai_t5_core.weights.calibrate import calibrate
from nai_t5_core.weights.calibration_report import plot, render


def precision_report(
    path: str | Path | None, headroom: float = 4.0, progress: Callable[[int, int], None] | None = None
) -> tuple[str, Tensor]:
    """The calibration of a T5 file: a table, and a plot as an image [1, height, width, 3] in 0…1.

    Raises:
        ValueError: the file is no T5 or has no tokenizer; a headroom below 1.
    """
    from PIL import Image
    from rich.console import Console

    calibration = calibrate(path, headroom=headroom, progress=progress, encoder_only=True)
    text = StringIO()
    Console(file=text, width=120).print(render(calibration))
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "maxima.png"
        plot(calibration, picture)
        pixels = np.asarray(Image.open(picture).convert("RGB"), dtype=np.float32) / 255
    return text.getvalue(), torch.from_numpy(pixels)[None]
