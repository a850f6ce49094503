"""An image of PixArt-Σ, whose pad tokens our T5 never computes, with one word made heavier if asked.

python examples/pixart_sigma.py --prompt "a red fox on a green hill" --emphasis fox
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from diffusers import PixArtSigmaPipeline
from PIL.Image import Image

from nai_t5_core.diffusers_adapter import replace_text_encoder
from nai_t5_core.diffusers_prompts import encode_prompt


def paint(pipe: PixArtSigmaPipeline, prompt: str, emphasis: str = "", **settings: Any) -> Image:
    """The image of a prompt; the settings are those of the pipeline's call."""
    replace_text_encoder(pipe)
    weights = {emphasis: 1.3} if emphasis else None
    encoded = encode_prompt(pipe, prompt, word_weights=weights)
    image: Image = pipe(**encoded, **settings).images[0]
    return image


def main(
    prompt: str = "a red fox on a green hill",
    emphasis: str = "",
    model: str = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    out: Path = Path("pixart_sigma.png"),
    steps: int = 20,
    size: int = 1024,
) -> None:
    pipe = PixArtSigmaPipeline.from_pretrained(model, torch_dtype=torch.bfloat16)
    if torch.accelerator.is_available():
        pipe.enable_model_cpu_offload()
    settings = {"num_inference_steps": steps, "use_resolution_binning": False}  # the very size that is asked for
    paint(pipe, prompt, emphasis, height=size, width=size, **settings).save(out)


if __name__ == "__main__":
    typer.run(main)
