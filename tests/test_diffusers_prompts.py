"""The adapter of `encode_prompt` against the pipelines' own, family by family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from test_diffusers_families import READ_PADS, assert_same, other_prompt, prompts_for
from toy_pipelines import NEGATIVE, PROMPT, TOYS, Toy, make

from nai_t5_core.diffusers.adapter import replace_text_encoder
from nai_t5_core.diffusers.encode_prompt import adapted_families, cut_text, encode_prompt, negative_cut_text

pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_adapted_family_is_tested() -> None:
    assert set(adapted_families()) | {"skyreels-v2"} == set(TOYS)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each pass through an encoder of ours, from here on."""
    from nai_t5_core.model.encoder import Encoder

    rows: list[int] = []
    real = Encoder._own_residual

    def counting(embeddings: torch.Tensor, *others: Any) -> torch.Tensor:
        rows.append(len(embeddings))
        return real(embeddings, *others)

    monkeypatch.setattr(Encoder, "_own_residual", staticmethod(counting))
    return rows


SEVERAL_PASSES = ("glm-image",)  # puts its ids together itself
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
        assert_same(list(result.outputs.values()), outputs, 1e-5)
        assert len(passes) == 1 or name in SEVERAL_PASSES or (name in NEED_QUOTES and not passes)


NO_EMBEDDINGS = ("longcat-audiodit", "visualcloze")  # their calls take texts only


def own_options(toy: Toy) -> tuple[dict[str, Any], dict[str, Any]]:
    """The toy's call in two parts: what `encode_prompt` is told, and the rest."""
    names = ("prompt", "negative_prompt", "max_sequence_length", "clean_caption")
    told = {name: value for name, value in toy.call.items() if name in names}
    rest = {name: value for name, value in toy.call.items() if name not in names}
    return told, rest


@pytest.mark.parametrize("name", [name for name in TOYS if name not in NO_EMBEDDINGS])
def test_the_call_takes_it_and_makes_the_same(name: str) -> None:
    toy = make(name)
    expected = toy.run()
    another = other_prompt(toy)
    told, toy.call = own_options(toy)
    replace_text_encoder(toy.pipe)
    assert_same(toy.run(**encode_prompt(toy.pipe, **told)), expected, 1e-4)
    # and the prompt counts
    other = toy.run(**encode_prompt(toy.pipe, **told | {"prompt": another}))
    assert (other - expected).abs().max() > 5e-3 * expected.abs().max()


@pytest.mark.parametrize("name", ["wan", "helios", "pixart-alpha", "pixart-sigma", "deepfloyd-if", "latte", "allegro"])
def test_defaults_are_those_of_the_call(name: str) -> None:
    """Lengths, and cleaning of the text, which differ from those of the pipeline's own `encode_prompt`."""
    pytest.importorskip("bs4", reason="the calls clean captions with beautifulsoup4")
    pytest.importorskip("ftfy", reason="the calls clean captions with ftfy")
    toy = make(name)
    prompt = "A   fox &amp; 'two' dogs http://example.com"
    _, toy.call = own_options(toy)
    expected = toy.run(prompt=prompt)
    replace_text_encoder(toy.pipe)
    encoded = encode_prompt(toy.pipe, prompt)
    assert_same(toy.run(**encoded), expected, 1e-4)
    if name in ("wan", "helios"):
        assert encoded["prompt_embeds"].shape[1] == 512


def test_calls_that_take_no_embeddings_say_so() -> None:
    toy = make("longcat-audiodit")
    replace_text_encoder(toy.pipe)
    encoded = encode_prompt(toy.pipe, PROMPT)
    assert encoded.outputs["prompt_embeds"].shape[0] == 1 and "EncodedPrompt()" in repr(encoded)
    with pytest.raises(ValueError, match=r"the call of LongCatAudioDiTPipeline takes no embeddings; .* in \.outputs"):
        toy.run(**encoded)


def test_a_negative_prompt_that_only_the_call_takes(passes: list[int]) -> None:
    toy = make("flux")
    told, toy.call = own_options(toy)
    options = {"negative_prompt": NEGATIVE, "negative_prompt_2": "two dogs"}
    expected = toy.run(**told, **options, true_cfg_scale=3.0)
    replace_text_encoder(toy.pipe)
    encoded = encode_prompt(toy.pipe, **told, **options)
    assert len(passes) == 1 and list(encoded.outputs)[3:] == [f"negative_{name}" for name in list(encoded.outputs)[:3]]
    assert_same(toy.run(**encoded, true_cfg_scale=3.0), expected, 1e-4)
    assert (toy.run(**encoded) - expected).abs().max() > 1e-2 * expected.abs().max()


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
    assert_same(
        list(result.outputs.values()), list(toy.pipe.encode_prompt([PROMPT, "cat", PROMPT, NEGATIVE], **options)), 1e-5
    )


def test_the_device_is_asked_for_once() -> None:
    """A pipeline looks at all modules of all its parts for an answer."""
    toy = make("pixart-sigma")
    asked = []

    class Counting(type(toy.pipe)):  # type: ignore[misc]
        @property
        def _execution_device(self) -> torch.device:
            asked.append(self)
            device: torch.device = super()._execution_device
            return device

    pipe = Counting(**toy.pipe.components)
    replace_text_encoder(pipe)
    encode_prompt(pipe, PROMPT, negative_prompt=NEGATIVE)
    assert len(asked) == 1


def test_prompts_for_each_encoder(passes: list[int]) -> None:
    toy = make("sd3")
    options = {"prompt_2": "two", "prompt_3": "three foxes", "negative_prompt_3": "four", "negative_prompt": NEGATIVE}
    expected = toy.encode_prompt(PROMPT, **options)
    options = toy.encode | options
    replace_text_encoder(toy.pipe)
    assert_same(list(encode_prompt(toy.pipe, PROMPT, **options).outputs.values()), expected, 1e-5)
    assert len(passes) == 1


@pytest.mark.parametrize("name", ["cogview3plus", "bria", "kandinsky3", "wan", "chroma"])
@pytest.mark.parametrize("options", [{"negative_prompt": None}, {"do_classifier_free_guidance": False}])
def test_without_a_negative_prompt(name: str, options: dict[str, Any], passes: list[int]) -> None:
    toy = make(name)
    if name == "kandinsky3" and "do_classifier_free_guidance" in options:
        options = {**options, "negative_prompt": None}
    expected = toy.encode_prompt(PROMPT, **options)
    replace_text_encoder(toy.pipe)
    assert_same(
        list(encode_prompt(toy.pipe, **toy.encode_arguments(PROMPT, **options)).outputs.values()), expected, 1e-5
    )
    assert len(passes) == 1


def test_a_wrong_prediction_changes_nothing(passes: list[int]) -> None:
    """A pipeline that changes the text in its own way: its prompts are encoded when it asks for them."""
    toy = make("flux")

    class Reversing(type(toy.pipe)):  # type: ignore[misc]
        def _get_t5_prompt_embeds(self, prompt: list[str], **options: Any) -> torch.Tensor:
            embeddings: torch.Tensor = super()._get_t5_prompt_embeds([text[::-1] for text in prompt], **options)
            return embeddings

    toy.pipe = Reversing(**toy.pipe.components)
    expected = toy.encode_prompt(PROMPT)
    replace_text_encoder(toy.pipe)
    assert_same(list(encode_prompt(toy.pipe, **toy.encode_arguments(PROMPT)).outputs.values()), expected, 1e-5)
    assert len(passes) == 2
    with pytest.raises(ValueError, match="Reversing changes these prompts itself"):
        encode_prompt(toy.pipe, PROMPT, word_weights={"fox": 2})
    passes.clear()
    toy.encode_prompt(PROMPT)
    assert len(passes) == 1, "nothing is remembered after the call"


def test_prompts_of_several_lengths_where_pads_are_text(passes: list[int]) -> None:
    """Bria's are encoded without pads; with the policy "attend" each length needs a pass."""
    toy = make("bria")
    prompts = [PROMPT, "a fox", "cat", "dog"]
    expected = toy.encode_prompt(prompts)
    replace_text_encoder(toy.pipe, padding="attend")
    result = encode_prompt(toy.pipe, **toy.encode_arguments(prompts))
    assert_same(list(result.outputs.values()), expected, 1e-5)
    lengths = {len(toy.tokenizer(text).input_ids) for text in [*prompts, NEGATIVE]}
    assert len(passes) == len(lengths) > 1


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
    toy = make("longcat-audiodit")
    replace_text_encoder(toy.pipe)
    with pytest.raises(ValueError, match="normalises each row, so that word_weights cannot be applied"):
        encode_prompt(toy.pipe, PROMPT, word_weights={"fox": 2})


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


@pytest.mark.parametrize("name", ["pixart-sigma", "flux", "sd3", "hunyuandit", "kandinsky3", "wan"])
def test_cut_text_of_negative_prompts(name: str) -> None:
    toy = make(name)
    replace_text_encoder(toy.pipe)
    long = "a red fox on a green hill " * 90
    _, toy.call = own_options(toy)
    both = encode_prompt(toy.pipe, ["a fox", long], negative_prompt=[long, "dog"])
    assert both.cut_text[0] == both.negative_cut_text[1] == ""
    assert both.cut_text[1] == both.negative_cut_text[0] and long.strip().endswith(both.cut_text[1].strip())
    assert len(both.cut_text[1]) > 20
    assert negative_cut_text(toy.pipe, "a fox", negative_prompt=long) == both.cut_text[1:]
    none = encode_prompt(toy.pipe, long)
    assert none.cut_text == both.cut_text[1:]
    assert none.negative_cut_text == ([] if name in ("flux", "kandinsky3") else [""])  # those encode no empty one


def test_negative_prompts_as_long_as_the_longest_prompt() -> None:
    """AudioLDM 2 pads prompts to the longest, and cuts the negative ones to it."""
    toy = make("audioldm2")
    asked = []
    toy.encoder.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[0]), prepend=True)
    negative = "a red fox on a green hill with two dogs"
    toy.encode_prompt(["a fox", "a blue bird"], negative_prompt=[negative, "dog"])
    seen = toy.tokenizer.decode(asked[1][0], skip_special_tokens=True)
    replace_text_encoder(toy.pipe)
    cut = negative_cut_text(toy.pipe, ["a fox", "a blue bird"], negative_prompt=[negative, "dog"], **toy.encode)
    assert 0 < len(seen) < len(negative)
    assert f"{seen} {cut[0]}" == negative and cut[1] == ""


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

    toy = make("visualcloze")
    replace_text_encoder(toy.pipe)
    with pytest.raises(ValueError, match="encode_prompt needs layout_prompt, task_prompt beside the prompt"):
        encode_prompt(toy.pipe, PROMPT)

    class OtherPipeline:
        components: dict[str, Any] = {}  # noqa: RUF012

    with pytest.raises(ValueError, match="encode_prompt of OtherPipeline is not known here"):
        encode_prompt(OtherPipeline(), PROMPT)
    assert set(READ_PADS) <= set(adapted_families())
