"""Makes the tiny T5 that ships in the package: ``python -m embedded.make``.

Random weights drawn by T5's own scheme, with a vocabulary trained on the grammar in this folder; the same seed gives
the same file. Encoder and decoder, so that every command has something to run on.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from embedded.vocabulary import SIZE, train_vocabulary
from nai_t5_core.config import Shape, T5Config, config_to_hf, decoder_tensors, encoder_tensors
from nai_t5_core.conversion import Conversion, convert
from nai_t5_core.hub import EMBEDDED_MODEL

SEED = 0
CONFIG = T5Config(
    vocab_size=SIZE,
    d_model=128,
    d_kv=32,
    d_ff=320,
    num_heads=4,
    num_layers=3,
    num_decoder_layers=3,
    tie_word_embeddings=True,
)


def random_weights(config: T5Config, seed: int) -> dict[str, Tensor]:
    """Untrained weights under their Hugging Face names, float32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = encoder_tensors(config) | decoder_tensors(config)
    return {name: _random_tensor(name, shape, config, generator) for name, shape in shapes.items()}


def _random_tensor(name: str, shape: Shape, config: T5Config, generator: torch.Generator) -> Tensor:
    if "layer_norm" in name:
        return torch.ones(shape)
    std = 1.0 if name == "shared.weight" else shape[1] ** -0.5
    if name.endswith(".q.weight"):
        std *= config.d_kv**-0.5
    elif name.endswith("relative_attention_bias.weight"):
        std = config.d_model**-0.5
    return torch.randn(shape, generator=generator) * std


def make(out: Path = EMBEDDED_MODEL) -> Conversion:
    """Writes the model through a Hugging Face folder and the project's own converter."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tiny"
        folder.mkdir()
        save_file(random_weights(CONFIG, SEED), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config_to_hf(CONFIG)))
        (folder / "spiece.model").write_bytes(train_vocabulary())
        out.parent.mkdir(exist_ok=True)
        return convert(folder, out, dtype="float16")


if __name__ == "__main__":
    made = make()
    print(f"{made.out}: {made.nbytes:,} bytes, {made.tensors} tensors")
