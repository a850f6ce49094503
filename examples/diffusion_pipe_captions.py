"""diffusion-pipe trains Wan on the embeddings of a caption set. From its folder, in the place of ``train.py``:

deepspeed …/diffusion_pipe_captions.py captions-wan --deepspeed --config wan.toml
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import torch

from nai_t5_core import EmbeddingDataset


def reader(folder: str) -> Any:
    """What diffusion-pipe calls with captions in the place of its text encoder.

    Raises:
        ValueError: the set was not made for Wan; later, a caption is not in it.
    """
    dataset = EmbeddingDataset(folder)
    feeding = dataset.plan.recipe.feeding
    if (feeding.family, feeding.max_length) != ("wan", 512):
        made = f"for {feeding.family or 'no family'} with {feeding.max_length} tokens"
        raise ValueError(f"{folder} was made {made}, and Wan is trained; make a set with --family wan")

    def read(caption: list[str], is_video: list[bool]) -> dict[str, torch.Tensor]:
        states, mask = dataset.batch([dataset.id_of_caption(text) for text in caption], pad_to=512)
        return {"text_embeddings": states, "seq_lens": mask.sum(dim=1)}

    return read


if __name__ == "__main__":
    sys.path.insert(0, ".")
    from models.wan.wan import WanPipeline  # type: ignore[import-not-found]

    read = reader(sys.argv.pop(1))
    WanPipeline.get_call_text_encoder_fn = lambda self, text_encoder: read
    runpy.run_path("train.py", run_name="__main__")
