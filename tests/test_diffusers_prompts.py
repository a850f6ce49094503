"""The adapter of `encode_prompt` against the pipelines' own, family by family."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from test_diffusers_families import READ_PADS, assert_same, prompts_for
from toy_pipelines import NEGATIVE, PROMPT, TOYS, make

from nai_t5_core.diffusers_adapter import replace_text_encoder
from nai_t5_core.diffusers_prompts import adapted_families, cut_text, encode_prompt

pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_adapted_family_is_tested() -> None:
    assert set(adapted_families()) | {"skyreels-v2"} == set(TOYS)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each pass through an encoder of ours, from here on."""
    from nai_t5_core.encoder import Encoder

    rows: list[int] = []
    real = Encoder.forward

    def counting(self: Encoder, embeddings: torch.Tensor, *others: Any) -> torch.Tensor:
        rows.append(len(embeddings))
        return real(self, embeddings, *others)

    monkeypatch.setattr(Encoder, "forward", counting)
    return rows


# Prompts that are not padded to one length need a pass for each length; GLM-Image puts its ids together itself.
SEVERAL_PASSES = ("bria", "longcat-audiodit", "audioldm2", "glm-image")
NEED_QUOTES = ("hunyuanimage", "hunyuanvideo-1.5")


@pytest.mark.parametrize("name", TOYS)
def test_same_as_the_pipelines_own(name: str, passes: list[int]) -> None:
    toy = make(name)
    prompts = prompts_for(toy)
    expected = [toy.encode_prompt(prompt) for prompt in prompts]
    replace_text_encoder(toy.pipe, padding="exact")
    for prompt, outputs in zip(prompts, expected, strict=True):
        arguments = toy.encode_arguments(prompt)
        passes.clear()
        result = encode_prompt(toy.pipe, **arguments)
        assert_same(list(result.values()), outputs, 1e-5)
        assert len(passes) == 1 or name in SEVERAL_PASSES or (name in NEED_QUOTES and not passes)


# HunyuanDiT's call wants the other encoder's embeddings as well, Stable Audio's those before its projection, and
# LongCat's takes none. GLM-Image's wants positive and negative ones of one length, which these prompts have not.
@pytest.mark.parametrize(
    "name", [name for name in TOYS if name not in ("hunyuandit", "stable-audio", "longcat-audiodit", "glm-image")]
)
def test_a_run_takes_it(name: str) -> None:
    """What the pipeline's call takes of the result gives what its own function's result gives."""
    toy = make(name)
    arguments = toy.encode_arguments(toy.call["prompt"])
    own = toy.encode_prompt(**arguments)
    replace_text_encoder(toy.pipe)
    result = encode_prompt(toy.pipe, **arguments)
    taken = inspect.signature(toy.pipe.__call__).parameters
    no_text = {key: None for key in ("prompt", "negative_prompt") if key in taken}
    images = [
        toy.run(**no_text, **{key: value for key, value in zip(result, values, strict=True) if key in taken})
        for values in (result.values(), own)
    ]
    assert any(key in taken for key in result)
    assert_same(*images, 1e-4)


def test_equal_prompts_are_encoded_once(passes: list[int]) -> None:
    toy = make("pixart-sigma")
    replace_text_encoder(toy.pipe)
    assert toy.encoder.padding == "skip"
    options = {"negative_prompt": NEGATIVE, "num_images_per_prompt": 2}
    result = encode_prompt(toy.pipe, [PROMPT, "cat", PROMPT, NEGATIVE], **options)
    counts = [len(toy.tokenizer(text).input_ids) for text in (PROMPT, "cat", NEGATIVE)]
    assert passes == [sum(counts)]
    assert result["prompt_embeds"].shape == (8, 300, 32)
    assert result["negative_prompt_embeds"].shape == (8, 300, 32)
    assert_same(list(result.values()), list(toy.pipe.encode_prompt([PROMPT, "cat", PROMPT, NEGATIVE], **options)), 1e-5)


def test_prompts_for_each_encoder(passes: list[int]) -> None:
    toy = make("sd3")
    options = {"prompt_2": "two", "prompt_3": "three foxes", "negative_prompt_3": "four", "negative_prompt": NEGATIVE}
    expected = toy.encode_prompt(PROMPT, **options)
    replace_text_encoder(toy.pipe)
    assert_same(list(encode_prompt(toy.pipe, PROMPT, max_sequence_length=48, **options).values()), expected, 1e-5)
    assert len(passes) == 1


@pytest.mark.parametrize("name", ["cogview3plus", "bria", "kandinsky3", "wan", "chroma"])
@pytest.mark.parametrize("options", [{"negative_prompt": None}, {"do_classifier_free_guidance": False}])
def test_without_a_negative_prompt(name: str, options: dict[str, Any], passes: list[int]) -> None:
    toy = make(name)
    if name == "kandinsky3" and "do_classifier_free_guidance" in options:
        options = {**options, "negative_prompt": None}
    expected = toy.encode_prompt(PROMPT, **options)
    replace_text_encoder(toy.pipe)
    assert_same(list(encode_prompt(toy.pipe, **toy.encode_arguments(PROMPT, **options)).values()), expected, 1e-5)
    assert len(passes) == 1


def test_a_wrong_prediction_changes_nothing(passes: list[int]) -> None:
    """Another cleaning than predicted: the pipeline's own prompts are encoded when it asks for them."""
    pytest.importorskip("bs4", reason="clean_caption=True needs beautifulsoup4")
    pytest.importorskip("ftfy", reason="clean_caption=True needs ftfy")
    toy = make("pixart-alpha")
    text = "a   fox &amp; 'two' dogs http://example.com"
    expected = toy.encode_prompt(text, clean_caption=True)
    replace_text_encoder(toy.pipe, padding="exact")
    arguments = toy.encode_arguments(text, clean_caption=True)
    assert_same(list(encode_prompt(toy.pipe, **arguments).values()), expected, 1e-5)
    assert len(passes) == 2
    passes.clear()
    toy.encode_prompt(text)
    assert len(passes) == 2, "nothing is remembered after the call"


@pytest.mark.parametrize("name", ["flux", "pixart-sigma", "wan", "bria"])
def test_word_weights(name: str, passes: list[int]) -> None:
    toy = make(name)
    replace_text_encoder(toy.pipe)
    arguments = toy.encode_arguments("a Red fox and a red fox")
    plain = encode_prompt(toy.pipe, **arguments)["prompt_embeds"]
    passes.clear()
    heavy = encode_prompt(toy.pipe, **arguments, word_weights={"red fox": 1.5, "and": 0.5})["prompt_embeds"]
    text = "a Red fox and a red fox".lower() if name == "pixart-sigma" else "a Red fox and a red fox"
    words = toy.tokenizer.convert_ids_to_tokens(toy.tokenizer(text).input_ids)
    factors = torch.ones(plain.shape[1])
    for place in range(len(words)):
        if words[place : place + 2] == ["▁red", "▁fox"]:
            factors[place : place + 2] = 1.5
        elif words[place] == "▁and":
            factors[place] = 0.5
    assert (factors == 1.5).sum() == (4 if name == "pixart-sigma" else 2) and (factors == 0.5).sum() == 1
    assert_same(heavy[0], plain[0] * factors[:, None], 1e-5)


def test_weights_that_cannot_be_applied_are_told() -> None:
    toy = make("pixart-alpha")
    replace_text_encoder(toy.pipe)
    with pytest.raises(ValueError, match="has 'blue', which stands in no prompt"):
        encode_prompt(toy.pipe, PROMPT, word_weights={"blue": 2})
    toy = make("glm-image")
    replace_text_encoder(toy.pipe)
    with pytest.raises(ValueError, match="GlmImagePipeline changes these prompts itself"):
        encode_prompt(toy.pipe, "says 'fox'", word_weights={"fox": 2})


def test_cut_text() -> None:
    toy = make("pixart-sigma")
    replace_text_encoder(toy.pipe)
    long = "a red fox on a green hill " * 9
    cut = cut_text(toy.pipe, ["A fox", long.upper()], max_sequence_length=40)
    assert cut[0] == ""
    assert cut[1] and long.strip().endswith(cut[1].strip())
    kept = len(toy.tokenizer(long).input_ids) - len(toy.tokenizer(cut[1]).input_ids) + 1
    assert kept == 40
    assert cut_text(toy.pipe, long, max_sequence_length=300) == [""]


def test_what_is_not_known_is_said() -> None:
    toy = make("pixart-sigma")
    with pytest.raises(ValueError, match=r"is not ours; call replace_text_encoder\(pipe\) first"):
        encode_prompt(toy.pipe, PROMPT)
    replace_text_encoder(toy.pipe)
    with pytest.raises(ValueError, match=r"(?s)has no argument prompt_3; it has prompt, do_class"):
        encode_prompt(toy.pipe, PROMPT, prompt_3="x", max_sequence_length=40)

    for nothing in (None, []):
        with pytest.raises(ValueError, match="give a text or a list of texts"):
            encode_prompt(toy.pipe, nothing)  # type: ignore[arg-type]

    class OtherPipeline:
        components: dict[str, Any] = {}  # noqa: RUF012

    with pytest.raises(ValueError, match="encode_prompt of OtherPipeline is not known here"):
        encode_prompt(OtherPipeline(), PROMPT)
    assert set(READ_PADS) <= set(adapted_families())
