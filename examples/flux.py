"""An image of Flux.1, with the T5 of its pipeline replaced by ours.

python examples/flux.py --prompt "a red fox on a green hill" --model black-forest-labs/FLUX.1-dev
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from diffusers import FluxPipeline
from PIL.Image import Image

from nai_t5_core.diffusers_adapter import replace_text_encoder
from nai_t5_core.diffusers_prompts import encode_prompt


def paint(pipe: FluxPipeline, prompt: str, **settings: Any) -> Image:
    """The image of a prompt; the settings are those of the pipeline's call."""
    replace_text_encoder(pipe)
    image: Image = pipe(**encode_prompt(pipe, prompt), **settings).images[0]
    return image


def main(
    prompt: str = "a red fox on a green hill",
    model: str = "black-forest-labs/FLUX.1-dev",
    out: Path = Path("flux.png"),
    steps: int = 28,
    size: int = 1024,
) -> None:
    pipe = FluxPipeline.from_pretrained(model, torch_dtype=torch.bfloat16)
    if torch.accelerator.is_available():
        pipe.enable_model_cpu_offload()
    paint(pipe, prompt, num_inference_steps=steps, height=size, width=size).save(out)


if __name__ == "__main__":
    typer.run(main)
