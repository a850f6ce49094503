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


MODEL_TYPES = {"chroma": "CHROMA_1", "flux": "FLUX_DEV_1", "pixart-alpha": "PIXART_ALPHA"}


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_onetrainer_is_given_what_its_t5_would_give(family: str, tmp_path: Path) -> None:
    feeding = Feeding.choose(family, 40)
    chosen = replace(order(family), feeding=feeding)
    folder = made(chosen, tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS)).path
    get_item = onetrainer_captions.reader(str(folder), MODEL_TYPES[family])
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
        onetrainer_captions.reader(str(folder), "FLUX_DEV_1")(encode, 0, 0)


@pytest.mark.parametrize(
    ("family", "model_type", "expected"),
    [
        # As long as Chroma's, and masked as well.
        ("wan", "CHROMA_1", r"set was made for wan, and CHROMA_1 is trained; make a set with --family chroma"),
        (None, "FLUX_DEV_1", r"set was made for no family, and FLUX_DEV_1 is trained; make a set with --family flux"),
        ("flux", "FLUX_2", r"model_type is 'FLUX_2'; sets are read for CHROMA_1, FLUX_DEV_1"),
    ],
)
def test_a_set_of_another_model_is_refused_by_onetrainer(
    family: str | None, model_type: str, expected: str, tmp_path: Path
) -> None:
    folder = made(order(family), tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS)).path
    with pytest.raises(ValueError, match=expected):
        onetrainer_captions.reader(str(folder), model_type)


def test_what_onetrainer_trains_is_read_from_its_configuration(tmp_path: Path) -> None:
    config = tmp_path / "chroma.json"
    config.write_text('{"batch_size": 2, "model_type": "CHROMA_1"}')
    for given in (["--config-path", str(config)], ["--secrets-path", "x", f"--config-path={config}"]):
        assert onetrainer_captions.model_type_of(given) == "CHROMA_1"
    config.write_text('{"batch_size": 2}')
    with pytest.raises(ValueError, match=r"chroma.json has no model_type; it has to name one of CHROMA_1"):
        onetrainer_captions.model_type_of(["--config-path", str(config)])


@pytest.mark.parametrize(
    ("feeding", "expected"),
    [
        (Feeding.choose("flux"), "was made for flux with 512 tokens"),
        (Feeding.choose("wan", 226), "was made for wan with 226 tokens"),
    ],
)
def test_a_set_of_another_model_is_refused_by_diffusion_pipe(feeding: Feeding, expected: str, tmp_path: Path) -> None:
    chosen = replace(order(), feeding=feeding)
    folder = made(chosen, tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS)).path
    with pytest.raises(ValueError, match=f"{expected}, and Wan is trained; make a set with --family wan"):
        diffusion_pipe_captions.reader(str(folder))


class Shuffled(Encode):
    def _get_previous_item(self, variation: int, name: str, index: int) -> Any:
        return "snow, fox, red" if name == "prompt" else super()._get_previous_item(variation, name, index)


@pytest.mark.parametrize("trainer", ["diffusion-pipe", "onetrainer"])
def test_a_caption_that_is_not_in_the_set_is_told(trainer: str, tmp_path: Path) -> None:
    """Such as tags that the trainer has shuffled."""
    family = {"diffusion-pipe": "wan", "onetrainer": "chroma"}[trainer]
    folder = made(order(family), tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS)).path
    with pytest.raises(ValueError, match=r"set has no caption 'snow, fox, red'.*add it to the set .* shuffled"):
        if trainer == "diffusion-pipe":
            diffusion_pipe_captions.reader(str(folder))([next(iter(TEXTS.values())), "snow, fox, red"], [False, False])
        else:
            onetrainer_captions.reader(str(folder), "CHROMA_1")(Shuffled(512, has_mask=True), 0, 0)
