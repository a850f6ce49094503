"""CLIP's embeddings, for families whose transformer reads them beside the T5's."""

from __future__ import annotations

from typing import Any

import torch

from nai_t5_core.datasets.arrow import MissingPackageError
from nai_t5_core.datasets.exports.sample import ClipEmbedding

_LENGTH = 77


class ClipEncoder:
    """The CLIP text encoders of a diffusers pipeline, in float32.

    Args:
        pipeline: a folder or hub id with ``text_encoder`` and ``tokenizer``; for SD3 also ``text_encoder_2`` and
            ``tokenizer_2``.
        both: whether there are two, as in SD3, whose states and pooled embeddings are joined.

    Raises:
        MissingPackageError: transformers is not installed.
        ValueError: the encoders cannot be loaded.
    """

    def __init__(self, pipeline: str, both: bool) -> None:
        try:
            from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
        except ImportError as error:
            raise MissingPackageError(
                f'CLIP needs transformers, which cannot be imported ({error}); pip install "comfy-nai-t5[transformers]"'
            ) from error
        kind: Any = CLIPTextModelWithProjection if both else CLIPTextModel
        self._both = both
        try:
            self._parts = [
                (
                    CLIPTokenizer.from_pretrained(pipeline, subfolder=f"tokenizer{number}"),
                    # Cast afterwards: the keyword for it has another name before transformers 4.56.
                    kind.from_pretrained(pipeline, subfolder=f"text_encoder{number}").float().eval(),
                )
                for number in (("", "_2") if both else ("",))
            ]
        except OSError as error:
            raise ValueError(f"CLIP cannot be loaded from {pipeline}: {error}") from error

    @torch.no_grad()
    def __call__(self, caption: str) -> ClipEmbedding:
        states, pooled, masks = [], [], []
        for tokenizer, model in self._parts:
            tokens = tokenizer(caption, padding="max_length", max_length=_LENGTH, truncation=True, return_tensors="pt")
            out = model(tokens.input_ids, output_hidden_states=self._both)
            pooled.append((out.text_embeds if self._both else out.pooler_output)[0])
            masks.append(tokens.attention_mask[0])
            if self._both:
                states.append(out.hidden_states[-2][0])
        return ClipEmbedding(torch.cat(pooled), torch.cat(states, dim=-1) if states else None, tuple(masks))
