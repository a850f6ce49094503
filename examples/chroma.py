"""An image of Chroma. Its transformer reads pad rows too, so they are computed as the pipeline's own T5 does.

python examples/chroma.py --prompt "a red fox on a green hill" --model lodestones/Chroma1-HD
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from diffusers import ChromaPipeline
from PIL.Image import Image

from nai_t5_core.diffusers_adapter import replace_text_encoder
from nai_t5_core.diffusers_prompts import encode_prompt


def paint(pipe: ChromaPipeline, prompt: str, negative_prompt: str = "", **settings: Any) -> Image:
    """The image of a prompt; the settings are those of the pipeline's call."""
    replace_text_encoder(pipe)
    encoded = encode_prompt(pipe, prompt, negative_prompt=negative_prompt)
    image: Image = pipe(**encoded, **settings).images[0]
    return image


def main(
    prompt: str = "a red fox on a green hill",
    negative_prompt: str = "low quality, blurred",
    model: str = "lodestones/Chroma1-HD",
    out: Path = Path("chroma.png"),
    steps: int = 40,
    size: int = 1024,
) -> None:
    pipe = ChromaPipeline.from_pretrained(model, torch_dtype=torch.bfloat16)
    if torch.accelerator.is_available():
        pipe.enable_model_cpu_offload()
    paint(pipe, prompt, negative_prompt, num_inference_steps=steps, height=size, width=size).save(out)


if __name__ == "__main__":
    typer.run(main)
