"""A video of Wan, as an animated GIF. Its T5 is a UMT5, of which ours computes the tokens of the text and no pads.

python examples/wan.py --prompt "a red fox runs over a hill" --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from diffusers import WanPipeline
from PIL.Image import Image

from nai_t5_core.diffusers_adapter import replace_text_encoder
from nai_t5_core.diffusers_prompts import encode_prompt

FRAMES_PER_SECOND = 16


def film(pipe: WanPipeline, prompt: str, negative_prompt: str = "", **settings: Any) -> list[Image]:
    """The frames of a prompt; the settings are those of the pipeline's call."""
    replace_text_encoder(pipe)
    encoded = encode_prompt(pipe, prompt, negative_prompt=negative_prompt)
    frames: list[Image] = pipe(**encoded, output_type="pil", **settings).frames[0]
    return frames


def main(
    prompt: str = "a red fox runs over a green hill",
    negative_prompt: str = "static, blurred",
    model: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    out: Path = Path("wan.gif"),
    steps: int = 50,
    height: int = 480,
    width: int = 832,
    frames: int = 81,
) -> None:
    pipe = WanPipeline.from_pretrained(model, torch_dtype=torch.bfloat16)
    if torch.accelerator.is_available():
        pipe.enable_model_cpu_offload()
    shape = {"height": height, "width": width, "num_frames": frames}
    first, *others = film(pipe, prompt, negative_prompt, num_inference_steps=steps, **shape)
    first.save(out, save_all=True, append_images=others, duration=1000 // FRAMES_PER_SECOND, loop=0)


if __name__ == "__main__":
    typer.run(main)
