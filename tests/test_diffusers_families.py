"""For every family: our encoder changes nothing in what its pipeline makes, and its padding policy is right."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from toy_pipelines import PROMPT, TOYS, Toy, make

from nai_t5_core.diffusers.adapter import family_of, padding_for, replace_text_encoder, restore_text_encoder
from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel

pytestmark = pytest.mark.filterwarnings("ignore")

# Families whose denoiser reads rows that the encoder's mask hides.
READ_PADS = ("hidream", "deepfloyd-if", "chroma", "hunyuandit", "latte")
GIVE_NO_MASK = ("flux", "visualcloze", "sd3", "cogvideox", "cogview3plus", "ltx-video", "bria")


def prompts_for(toy: Toy) -> list[str | list[str]]:
    limit = toy.encode.get("max_sequence_length") or toy.call.get("max_sequence_length") or 256
    foxes = bisect_right(range(600), limit, key=lambda count: len(toy.tokenizer("a" + " fox" * count).input_ids))
    exact = "a" + " fox" * (foxes - 1)
    prompts = ["", "cat", "ein Füchslein – 狐 🦊", exact, exact + " red fox" * 40, [PROMPT, "", "cat"]]
    quoted = [f'says "{text}"' for text in ("HELLO", "Füchslein", "x" * 300)]
    return [*prompts, *quoted] if "hunyuan" in family_of(toy.pipe).name else prompts  # type: ignore[union-attr]


def assert_same(ours: Any, theirs: Any, relative: float) -> None:
    """Tensors equal up to a share of the largest value, masks and the rest alike."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, Tensor) and theirs.is_floating_point():
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if theirs.numel():
            assert (ours - theirs).abs().max() <= relative * theirs.abs().max()
    elif isinstance(theirs, Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    elif isinstance(theirs, list | tuple):
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other, relative)
    else:
        assert ours == theirs


class Spoiled(nn.Module):
    """An encoder that puts noise into the rows that its mask hides."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        self.masked_rows = 0

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.encoder.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.encoder.device
        return device

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **other: Any) -> Any:
        out = self.encoder(input_ids, attention_mask=attention_mask, **other)
        if attention_mask is not None:
            pads = attention_mask == 0
            self.masked_rows += int(pads.sum())
            noise = torch.randn(out.last_hidden_state.shape, generator=torch.Generator().manual_seed(3))
            out.last_hidden_state = torch.where(pads[..., None], noise, out.last_hidden_state)
        return out


@pytest.mark.parametrize("name", TOYS)
def test_drop_in_changes_nothing(name: str) -> None:
    """Every row of `encode_prompt`, pad rows included, and the result of a run; then the same with theirs back."""
    toy = make(name)
    old, prompts = toy.encoder, prompts_for(toy)
    expected, image = [toy.encode_prompt(prompt) for prompt in prompts], toy.run()
    replace_text_encoder(toy.pipe, padding="exact")
    assert isinstance(toy.encoder, NAIT5EncoderModel)
    for prompt, outputs in zip(prompts, expected, strict=True):
        assert_same(toy.encode_prompt(prompt), outputs, 1e-5)
    assert_same(toy.run(), image, 1e-4)
    restore_text_encoder(toy.pipe)
    assert toy.encoder is old
    for prompt, outputs in zip(prompts, expected, strict=True):
        assert_same(toy.encode_prompt(prompt), outputs, 1e-5)
    assert_same(toy.run(), image, 1e-4)


@pytest.mark.parametrize("name", TOYS)
def test_policy_of_the_family_changes_no_result(name: str) -> None:
    toy = make(name)
    image, other = toy.run(), toy.run(prompt=other_prompt(toy))
    assert (image - other).abs().max() > 5e-3 * image.abs().max(), "the prompt does not matter here"
    replace_text_encoder(toy.pipe)
    assert toy.encoder.padding == ("exact" if name in (*READ_PADS, *GIVE_NO_MASK[:-1]) else "skip")
    assert toy.encoder.padding == padding_for(toy.pipe).padding
    assert_same(toy.run(), image, 1e-4)
    assert_same(toy.run(prompt=other_prompt(toy)), other, 1e-4)


def other_prompt(toy: Toy) -> str | list[str]:
    return ["two", "a blue dog in the sea"] if isinstance(toy.call["prompt"], list) else 'the "WORLD" is blue'


@pytest.mark.parametrize("name", TOYS)
def test_whether_pad_rows_are_read(name: str) -> None:
    """Noise in them is the evidence: no bit of the result may change where a policy skips them."""
    toy = make(name)
    image = toy.run()
    toy.encoder = spoiled = Spoiled(toy.encoder)
    noisy = toy.run()
    if name in GIVE_NO_MASK:
        assert spoiled.masked_rows == 0
    elif name in READ_PADS:
        assert (noisy - image).abs().max() > 1e-2 * image.abs().max()
    else:
        assert spoiled.masked_rows > 0 and torch.equal(noisy, image)


def test_an_empty_prompt_that_masks_a_whole_batch() -> None:
    """Mochi may be told to, and then no row of its encoder is real."""
    from toy_videos import mochi

    toy = mochi(force_zeros=True)
    toy.pipe.set_progress_bar_config(disable=True)
    image = toy.run(negative_prompt="")
    replace_text_encoder(toy.pipe)
    assert toy.encoder.padding == "skip"
    assert_same(toy.run(negative_prompt=""), image, 1e-4)
    toy.encoder = spoiled = Spoiled(toy.encoder)
    assert_same(toy.run(negative_prompt=""), image, 1e-4)
    assert spoiled.masked_rows > 40


def test_unknown_pipelines_are_exact() -> None:
    class OwnPipeline:
        """Not in the table."""

    assert padding_for(OwnPipeline()).padding == "exact"
    assert "OwnPipeline is not in the table" in padding_for(OwnPipeline()).reason
    toy = make("pixart-sigma")

    class Derived(type(toy.pipe)):  # type: ignore[misc]
        """Of a known one."""

    assert padding_for(Derived(**toy.pipe.components)).padding == "skip"
