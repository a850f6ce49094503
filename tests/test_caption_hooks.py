"""Trainers that keep embeddings in a form of their own are given a set's by a hook.

``upstream_trainers.py`` puts the hooks into the trainers' own code.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pyarrow")

from toy_captions import captions, made, order, write_captions

from examples import diffusion_pipe_captions, onetrainer_captions
from nai_t5_core.datasets.reading import EmbeddingDataset
from nai_t5_core.datasets.recipe import Feeding

TEXTS = captions(12)


def test_diffusion_pipe_is_given_what_its_t5_would_give(tmp_path: Path) -> None:
    folder = made(order("wan"), tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS)).path
    read = diffusion_pipe_captions.reader(str(folder))
    given = read(list(TEXTS.values()), [True] * len(TEXTS))
    states, mask = EmbeddingDataset(folder).batch(list(TEXTS), pad_to=512)
    assert given["text_embeddings"].equal(states) and given["seq_lens"].equal(mask.sum(dim=1))


class Encode:
    """What the hook reads of mgds' ``EncodeT5Text``."""

    tokens_in_name = "tokens"
    hidden_state_out_name = "text_encoder_hidden_state"

    def __init__(self, length: int, has_mask: bool) -> None:
        self.tokens_attention_mask_in_name = "tokens_mask" if has_mask else None
        self._length = length

    def _get_previous_item(self, variation: int, name: str, index: int) -> Any:
        return {"tokens": torch.zeros(self._length), "prompt": list(TEXTS.values())[index]}[name]


@pytest.mark.parametrize("family", ["chroma", "flux", "pixart-alpha"])
def test_onetrainer_is_given_what_its_t5_would_give(family: str, tmp_path: Path) -> None:
    feeding = Feeding.choose(family, 40)
    chosen = replace(order(family), feeding=feeding)
    folder = made(chosen, tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS)).path
    get_item = onetrainer_captions.reader(str(folder))
    encode = Encode(40, has_mask=feeding.padding != "attend")
    for number, name in enumerate(TEXTS):
        given = get_item(encode, 0, number, "text_encoder_hidden_state")
        expected = EmbeddingDataset(folder).batch([name], pad_to=40)[0][0]
        assert list(given) == ["text_encoder_hidden_state"] and given["text_encoder_hidden_state"].equal(expected)


@pytest.mark.parametrize(
    ("encode", "needed"),
    [
        (Encode(77, has_mask=False), "--max-length 77 --padding attend"),
        (Encode(40, has_mask=True), "--max-length 40, and not --padding attend"),
    ],
)
def test_a_set_of_another_length_or_padding_is_refused(encode: Encode, needed: str, tmp_path: Path) -> None:
    chosen = replace(order("flux"), feeding=Feeding.choose("flux", 40))
    folder = made(chosen, tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS)).path
    with pytest.raises(ValueError, match=needed):
        onetrainer_captions.reader(str(folder))(encode, 0, 0)
