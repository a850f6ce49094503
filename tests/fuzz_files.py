"""Small whole files, to be damaged."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from checkpoints import encoder_part
from conftest import random_state

from nai_t5_core.facts.config import T5Config

CONFIG = T5Config(
    vocab_size=160,
    d_model=8,
    d_kv=4,
    d_ff=8,
    num_heads=2,
    num_layers=2,
    num_decoder_layers=1,
    relative_attention_num_buckets=4,
    relative_attention_max_distance=4,
)
STATE = random_state(CONFIG)
ENCODER = encoder_part(STATE)


def sentencepiece_model(vocab_size: int = 40, **options: Any) -> bytes:
    """A model of few pieces, with a character map of few rules."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red fox", "two black cats sit", "the fox and the cat", "a cat on a mat"] * 9),
        model_writer=written,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        **options,
    )
    return written.getvalue()


def torch_file(value: object, **options: Any) -> bytes:
    written = io.BytesIO()
    torch.save(value, written, **options)
    return written.getvalue()


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def rules(folder: Path) -> Path:
    """Two characters that become others, as the trainer takes them."""
    rules = folder / "rules.tsv"
    rules.write_text("FB01\t66 69\nFF26\t46\n")
    return rules


def bpe_json() -> bytes:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", "▁", "a", "c", "t", "at", "cat"])}
    backend = Backend(models.BPE(vocabulary, [("a", "t"), ("c", "at")], unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(["</s>"])
    return backend.to_str().encode()


def training_config() -> bytes:
    sizes = CONFIG.model_dump(include={"vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers"})
    lines = [
        'out = "run"\nsteps = 6\nseed = 3\ndropout = 0.1\n[model]\ntokenizer = "spiece.model"\n[model.sizes]',
        *(f"{name} = {value}" for name, value in sizes.items()),
        "num_heads = 2\n[optimizer]\nlearning_rate = 0.01\nbetas = [0.9, 0.99]",
        '[[data]]\nobjective = "prefix"\nfile = "texts.txt"\nrows = 3\nmax_length = 20',
    ]
    return "\n".join(lines).encode()
