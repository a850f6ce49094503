"""Prompts beyond the length in pipelines: split into chunks, encoded each by itself, and joined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from test_diffusers_families import assert_same
from toy_pipelines import NEGATIVE, TOYS, Toy, make

from nai_t5_core.diffusers.adapter import family_of, replace_text_encoder
from nai_t5_core.diffusers.encode_prompt import cut_text, encode_prompt
from nai_t5_core.diffusers.prompt_chunks import split_text

pytestmark = pytest.mark.filterwarnings("ignore")

LONG = "a red fox on a green hill with two dogs and a blue bird under an old tree " * 8 + "at the end"
ONE_CHUNK = [
    *("audioldm2", "cogvideox", "cogview3plus", "glm-image", "hunyuandit", "hunyuanimage", "hunyuanvideo-1.5"),
    *("kandinsky3", "latte", "longcat-audiodit", "visualcloze"),
]
SPLIT = [name for name in TOYS if name not in ONE_CHUNK]


def replaced(name: str) -> tuple[Toy, dict[str, Any]]:
    """The toy with our encoder, and what `encode_prompt` is told beside the prompt."""
    toy = make(name)
    replace_text_encoder(toy.pipe)
    return toy, {key: value for key, value in toy.encode_arguments("").items() if key != "prompt"}


def rows_of_t5(encoded: Any) -> Tensor:
    return next(value for name, value in encoded.items() if name in ("prompt_embeds", "prompt_embeds_t5"))


@pytest.mark.parametrize("name", SPLIT)
def test_chunks_are_joined_and_the_call_takes_them(name: str) -> None:
    toy, options = replaced(name)
    limit = encode_prompt(toy.pipe, "", **options)
    whole = encode_prompt(toy.pipe, LONG, max_chunks=9, **options)
    cut = encode_prompt(toy.pipe, LONG, **options)
    assert cut.cut_text[0].endswith("at the end") and whole.cut_text == [""]
    assert cut.cut_text == cut_text(toy.pipe, LONG, **options)
    count, more = divmod(rows_of_t5(whole).shape[1] - rows_of_t5(limit).shape[1], length_of(toy))
    assert (count, more) >= (1, 0) and more == 0
    if "negative_prompt_embeds" in whole:
        assert whole["negative_prompt_embeds"].shape == whole["prompt_embeds"].shape
    rest = {key: value for key, value in toy.call.items() if key not in ("prompt", "negative_prompt", *toy.encode)}
    toy.call = rest
    images = [toy.run(**encoded) for encoded in (whole, cut)]
    assert images[0].isfinite().all()
    assert (images[0] - images[1]).abs().max() > 1e-3 * images[1].abs().max(), "what is behind the limit counts"


def length_of(toy: Toy) -> int:
    row = family_of(toy.pipe)
    assert row is not None
    limited = toy.encode.get("max_sequence_length") or row.max_length
    return min(limited, toy.tokenizer.model_max_length) if row.name == "stable-audio" else limited


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart-sigma", "chroma", "wan", "bria", "mochi", "stable-audio"])
def test_each_chunk_is_encoded_by_itself(name: str) -> None:
    toy, options = replaced(name)
    length = length_of(toy)
    whole = rows_of_t5(encode_prompt(toy.pipe, LONG, max_chunks=9, **options))

    def fits(text: str) -> bool:
        return len(toy.tokenizer(text).input_ids) <= length

    pieces = split_text(LONG, fits, 9)
    alone = [rows_of_t5(encode_prompt(toy.pipe, piece, **options))[:, -length:] for piece in pieces]
    assert len(pieces) > 1
    assert_same(whole[:, -length * len(pieces) :], torch.cat(alone, dim=1), 1e-5)


@pytest.mark.parametrize("name", ["pixart-sigma", "allegro", "ltx-condition", "mochi", "auraflow"])
def test_a_short_prompt_gains_nothing_beside_a_long_one(name: str) -> None:
    """Its absent chunks are hidden by the mask, or zeros as its pads are, so that its image stays the same."""
    toy, options = replaced(name)
    options |= {"negative_prompt": [NEGATIVE] * 2}
    both = encode_prompt(toy.pipe, ["cat", LONG], max_chunks=9, **options)
    alone = encode_prompt(toy.pipe, ["cat", "dog"], **options)
    length = length_of(toy)
    rows = both["prompt_embeds"]
    assert rows.shape[1] > length
    assert_same(rows[0, :length], alone["prompt_embeds"][0], 1e-5)
    assert rows[0, length:].abs().max() == 0 and both["negative_prompt_embeds"][:, length:].abs().max() == 0
    mask, own = both["prompt_attention_mask"], alone["prompt_attention_mask"]
    assert torch.equal(mask[0, : own.shape[1]], own[0]) and not mask[0, own.shape[1] :].any()
    assert mask[1, own.shape[1] :].any() and mask.dtype == own.dtype


def test_chroma_shows_one_pad_of_the_last_chunk_only() -> None:
    toy, options = replaced("chroma")
    mask = encode_prompt(toy.pipe, [LONG, "cat"], max_chunks=9, **options | {"negative_prompt": ["", ""]})
    tokens = [len(toy.tokenizer(text).input_ids) for text in (LONG, "cat")]
    chunks = mask["prompt_attention_mask"].shape[1] // length_of(toy)
    shown = mask["prompt_attention_mask"].sum(1)
    assert shown[1] == tokens[1] + 1
    assert tokens[0] + 1 <= shown[0] <= tokens[0] + 2 * chunks


def test_weights_reach_every_chunk_and_split_no_words() -> None:
    toy, options = replaced("pixart-sigma")
    plain = encode_prompt(toy.pipe, LONG, max_chunks=9, **options)
    for words in ("fox", "at the end"):
        heavy = encode_prompt(toy.pipe, LONG, max_chunks=9, word_weights={words: 2.0}, **options)
        factors = (heavy["prompt_embeds"] / plain["prompt_embeds"])[0, :, 0]
        count = LONG.count(words) * len(toy.tokenizer(words, add_special_tokens=False).input_ids)
        assert (factors > 1.9).sum() == count


def test_what_exceeds_the_last_chunk_is_told() -> None:
    toy, options = replaced("flux")
    two = encode_prompt(toy.pipe, [LONG, "cat"], max_chunks=2, **options)
    assert two.cut_text[0].endswith("at the end") and two.cut_text[1] == ""
    assert len(two.cut_text[0]) < len(encode_prompt(toy.pipe, LONG, **options).cut_text[0])
    both = encode_prompt(toy.pipe, "cat", negative_prompt=LONG, max_chunks=9, **options)
    assert both["negative_prompt_embeds"].shape == both["prompt_embeds"].shape


@pytest.mark.parametrize("name", ONE_CHUNK)
def test_families_that_take_no_longer_text(name: str) -> None:
    toy, options = replaced(name)
    with pytest.raises(ValueError, match=rf"max_chunks=2, but {type(toy.pipe).__name__} takes no longer text: \w+"):
        encode_prompt(toy.pipe, LONG, max_chunks=2, **options)
    with pytest.raises(ValueError, match="max_chunks=0; it must be 1 or more"):
        encode_prompt(toy.pipe, LONG, max_chunks=0, **options)
