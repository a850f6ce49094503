"""Textual inversion: trained embedding vectors that a word in a prompt is replaced by."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from nai_t5_core.backends.quantised.projections import QuantisedEmbedding
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.tokenizer.placeholders import PlaceholderTokenizer
from nai_t5_core.weights.formats import Checkpoint, open_checkpoint

# Names of the T5's vectors in files with vectors for several text encoders.
_T5_KEYS = ("t5xxl", "t5", "umt5xxl", "umt5", "pile_t5xl", "mt5xl", "t5base")


@torch.no_grad()
def add_embeddings(encoder: TextEncoder, source: Tensor | str | Path, token: str, key: str | None = None) -> list[int]:
    """Makes ``token`` in prompts stand for trained vectors; each vector takes one token position.

    >>> add_embeddings(encoder, "my-cat.safetensors", "<my-cat>")
    [32128, 32129]
    >>> encoder.encode(["a photo of <my-cat> on a sofa"])

    Args:
        encoder: changed; its embedding table grows by the vectors. It may be prepacked, quantised or compiled.
        source: [vectors, d_model] or [d_model], or a safetensors or PyTorch file that holds them.
        token: the word for prompts, found in upper and lower case alike, but not inside other words.
        key: the tensor's name in the file. By default the file's only tensor, or the one named like ``token``, or the
            T5's among those for several text encoders.

    Returns:
        The ids of the vectors.

    Raises:
        CheckpointError: the file is unusable.
        ValueError: no tensor of the file can be chosen; vectors of another width, or not finite in the model's dtype; a
            token that is empty or taken.
    """
    vectors = source if isinstance(source, Tensor) else _read(open_checkpoint(source), token, key)
    rows = _rows(vectors, encoder.stack)
    with encoder.stack.turns.change():
        first = encoder.stack.config.vocab_size
        ids = list(range(first, first + len(rows)))
        old = encoder.tokenizer
        base, words = (old.base, old.words) if isinstance(old, PlaceholderTokenizer) else (old, {})
        if token in words:
            raise ValueError(f"the word {token!r} has vectors already; take another")
        tokenizer = PlaceholderTokenizer(base, {**words, token: ids})
        with encoder.stack.alterations.by("textual inversion", lambda: encoder.stack.config.vocab_size):
            _grow(encoder.stack, rows)
        # Last: from now on other threads may find the word in their prompts.
        encoder.tokenizer = tokenizer
    return ids


def _read(checkpoint: Checkpoint, token: str, key: str | None) -> Tensor:
    names = list(checkpoint.tensors)
    wanted = [key] if key is not None else [token, *_T5_KEYS, *(names if len(names) == 1 else [])]
    found = [name for name in wanted if name in checkpoint.tensors]
    if not found:
        listed = ", ".join(names[:8]) or "nothing"
        raise ValueError(f"{checkpoint.source} holds {listed}, none of which is known for a T5's vectors; give key=")
    return checkpoint.read(found[0])


def _rows(vectors: Tensor, stack: T5EncoderStack) -> Tensor:
    """The vectors as rows of the embedding table, with its scale, dtype and device: [vectors, d_model]."""
    width = stack.config.d_model
    if not vectors.is_floating_point():
        raise ValueError(f"vectors of {vectors.dtype}; floating point numbers are needed: the file is damaged")
    if vectors.ndim not in (1, 2) or vectors.shape[-1] != width or not vectors.numel():
        raise ValueError(
            f"vectors of shape {list(vectors.shape)}; this model takes [vectors, {width}] or [{width}]: "
            "they were trained for another text encoder"
        )
    rows = (vectors.reshape(-1, width).float() * stack.scales.embedding).to(stack.shared.weight.device, stack.dtype)
    if not rows.isfinite().all():
        raise ValueError(f"the vectors hold values that are not finite in {stack.dtype}")
    return rows


def _grow(stack: T5EncoderStack, rows: Tensor) -> None:
    if isinstance(stack.shared, QuantisedEmbedding):
        stack.shared.grow(rows)
    else:
        table = stack.shared.weight
        stack.shared.weight = nn.Parameter(torch.cat((table, rows)), requires_grad=table.requires_grad)
        stack.shared.num_embeddings = len(stack.shared.weight)
    stack.config = stack.config.model_copy(update={"vocab_size": len(stack.shared.weight)})
