"""T5 Encode against ComfyUI's own text node."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from comfy_toys import (
    FAMILY_CONFIGS,
    assert_equal_conditioning,
    conditioning,
    error,
    require_comfyui,
    stock,
    toy_family,
    toy_file,
)

require_comfyui()

PROMPT = "a photo of a (red:1.2) fox in the snow, morning light, a photograph of great detail"


@pytest.mark.parametrize("family", ["pixart", "ltxv", "wan", "auraflow", "ace"])
def test_without_a_limit_it_is_the_stock_node(family: str, tmp_path: Path) -> None:
    from comfy_nai_t5.encode import encode

    clip = stock(toy_file(tmp_path, FAMILY_CONFIGS[family]), family)
    with torch.inference_mode():
        (((states, extras),), tokens) = encode(clip, PROMPT)
    assert_equal_conditioning({"cond": states, **extras}, conditioning(clip, PROMPT), 1e-9)
    assert 10 < tokens.count <= tokens.rows == states.shape[1] and tokens.cut_text == ""


@pytest.mark.parametrize(("family", "rows"), [("pixart", 0), ("ltxv", 128), ("wan", 512), ("auraflow", 256)])
def test_what_is_cut_is_as_if_it_were_not_there(family: str, rows: int, tmp_path: Path) -> None:
    from comfy_nai_t5.encode import encode

    clip = stock(toy_file(tmp_path, FAMILY_CONFIGS[family]), family)
    with torch.inference_mode():
        (((expected, _),), kept) = encode(clip, "one two three four")
        (((states, _),), tokens) = encode(clip, "one two three four five six", max_length=kept.count)
    assert tokens.cut_text.strip() == "five six" and tokens.count > kept.count
    assert states.shape[1] == tokens.rows == (rows or kept.count)
    assert error(states, expected) < 1e-6


def test_lines_are_what_they_are_alone(tmp_path: Path) -> None:
    from comfy_nai_t5.encode import encode, encode_lines

    clip = stock(toy_file(tmp_path, FAMILY_CONFIGS["mochi"]), "mochi")
    lines = ["a cat", "two (dogs:1.3) on a sofa"]
    with torch.inference_mode():
        (((states, extras),), _) = encode_lines(clip, lines)
        alone = [encode(clip, line)[0][0] for line in lines]
    assert states.shape == (2, 256, 64) and extras["attention_mask"].shape == (2, 256)
    for row, mask, (expected, wanted) in zip(states, extras["attention_mask"], alone, strict=True):
        assert error(row[None], expected) < 1e-6 and torch.equal(mask[None], wanted["attention_mask"])


@pytest.mark.parametrize("by_the_stock_node", [True, False])
def test_an_endless_prompt_is_refused(by_the_stock_node: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_nai_t5 import families
    from comfy_nai_t5.encode import encode
    from comfy_nai_t5.loaders import load_t5

    monkeypatch.setitem(families.FAMILIES, "pixart", toy_family("pixart"))
    clip = load_t5(toy_file(tmp_path, FAMILY_CONFIGS["pixart"]), "pixart")
    encoding = partial(conditioning, clip) if by_the_stock_node else partial(encode, clip)
    told = "the prompt has 10,00[01] tokens, and 8,192 are the most that are computed together; shorten it"
    with torch.inference_mode(), pytest.raises(ValueError, match=told):
        encoding("word " * 10_000)
