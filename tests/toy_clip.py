"""A diffusers pipeline's folder with tiny CLIP text encoders."""

from __future__ import annotations

import json
from pathlib import Path


def write_clip(folder: Path, both: bool) -> str:
    """A pipeline's folder with tiny CLIP encoders of the real classes and sizes of their results."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {f"{chr(97 + i)}{end}": 2 * i + (end != "") for i in range(26) for end in ("", "</w>")}
    vocabulary |= {"<|startoftext|>": 52, "<|endoftext|>": 53}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    for number, width in (("", 32), ("_2", 24)) if both else (("", 32),):
        tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        tokenizer.model_max_length = 77
        tokenizer.save_pretrained(folder / "clip" / f"tokenizer{number}")
        sizes = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = CLIPTextConfig(vocab_size=54, **sizes, projection_dim=width, bos_token_id=52, eos_token_id=53)
        kind = CLIPTextModelWithProjection if both else CLIPTextModel
        kind(config).save_pretrained(folder / "clip" / f"text_encoder{number}")
    return str(folder / "clip")
