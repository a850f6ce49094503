"""Words that stand for trained vectors give what feeding those vectors gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import spiece_model
from safetensors.torch import save_file
from torch import Tensor

from nai_t5_core.backends.choose import why_not_prepack
from nai_t5_core.facts.scales import LayerScales, StackScales
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.prompts.textual_inversion import add_embeddings
from nai_t5_core.tokenizer import ByteTokenizer, JsonTokenizer, SentencePieceTokenizer, sentencepiece_to_tokenizer_json
from nai_t5_core.tokenizer.placeholders import PlaceholderTokenizer
from nai_t5_core.weights.load import load as load_model

D_MODEL = 128


def load(**options: object) -> TextEncoder:
    return TextEncoder.from_pretrained(dtype="float32", device="cpu", **{"optimize": False, **options})  # type: ignore[arg-type]


def vectors(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, D_MODEL, generator=torch.Generator().manual_seed(seed))


def fed(encoder: TextEncoder, *parts: str | Tensor) -> Tensor:
    """Hidden states of texts and vectors, joined by hand before an encoder that knows no words of ours."""
    embeddings = []
    for part in parts:
        if isinstance(part, str):
            ids = torch.tensor(encoder.tokenizer.encode(part, add_eos=False), dtype=torch.long)
            part = encoder.stack.embed(ids)
        embeddings.append(part.view(-1, D_MODEL))
    embeddings.append(encoder.stack.embed(torch.tensor([encoder.tokenizer.eos_token_id])))
    with torch.no_grad():
        out: Tensor = encoder.stack(inputs_embeds=torch.cat(embeddings)[None])
    return out


@pytest.mark.parametrize("count", [1, 3])
def test_equals_feeding_the_vectors(count: int) -> None:
    encoder, plain = load(), load()
    rows = plain.stack.config.vocab_size
    assert add_embeddings(encoder, vectors(count), "<my-cat>") == list(range(rows, rows + count))
    out = encoder.encode(["a photo of <my-cat> on a sofa"])
    expected = fed(plain, "a photo of", vectors(count), "on a sofa")
    torch.testing.assert_close(out.hidden_states, expected, rtol=0, atol=1e-6)
    assert out.token_counts == [expected.shape[1]]


def test_a_batch_of_words() -> None:
    """Two words, one of them the beginning of the other, twice in a prompt and beside prompts without."""
    encoder, plain = load(), load()
    short, long = vectors(2, 1), vectors(4, 2)
    add_embeddings(encoder, short, "sks")
    add_embeddings(encoder, long, "sks-dog")
    out = encoder.encode(["sks and sks-dog, SKS!", "two dogs", "masks"])
    assert out.token_counts[1:] == plain.count(["two dogs", "masks"])
    expected = fed(plain, short, "and", long, ",", short, "!")
    torch.testing.assert_close(out.unpadded()[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(out.unpadded()[1], plain.encode(["two dogs"]).hidden_states[0], rtol=0, atol=1e-5)


def test_families_that_clean_the_text() -> None:
    """PixArt's pipeline lower-cases prompts, the word included."""
    encoder, plain = load(), load()
    add_embeddings(encoder, vectors(), "<My-Cat>")
    out = encoder.encode(["A Photo of <My-Cat>"], "pixart-sigma")
    torch.testing.assert_close(out.unpadded()[0], fed(plain, "a photo of", vectors())[0], rtol=0, atol=1e-5)


def test_prepacked() -> None:
    encoder = load(optimize=True)
    if why_not_prepack(load().stack) is not None:
        pytest.skip("this machine's oneDNN packs no float32 weights")
    add_embeddings(encoder, vectors(), "<my-cat>")
    for _ in range(3):
        out = encoder.encode(["<my-cat>"])
    torch.testing.assert_close(out.hidden_states, fed(load(), vectors()), rtol=0, atol=1e-5)


def test_float16_scales() -> None:
    """The embedding table may hold a scale, which the vectors share."""
    plain = load()
    layers = (LayerScales(),) * plain.stack.config.num_layers
    loaded = load_model(None, "float32", "cpu", scales=StackScales(layers, 0.25))
    encoder = TextEncoder(loaded.stack, plain.tokenizer)
    add_embeddings(encoder, vectors(), "<my-cat>")
    out = encoder.encode(["a <my-cat>"]).hidden_states
    torch.testing.assert_close(out, fed(load(), "a", vectors()), rtol=0, atol=1e-5)


def test_what_was_cut() -> None:
    encoder = load()
    add_embeddings(encoder, vectors(4), "<my-cat>")
    prompt = "a cat <my-cat> and a dog"
    before = encoder.count(["a cat"])[0]
    out = encoder.encode([prompt], max_length=before + 2)
    assert out.cut_text == ["<my-cat> and a dog"]
    assert encoder.encode([prompt], max_length=before + 4).cut_text == ["and a dog"]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensors",
    [
        {"<my-cat>": vectors()},
        {"emb_params": vectors()},
        {"clip_l": torch.ones(2, 768), "t5xxl": vectors()},
        {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280), "t5": vectors()},
        {"<other>": torch.ones(2, 8), "<my-cat>": vectors()},
    ],
    ids=["diffusers", "one", "ComfyUI", "OneTrainer", "several words"],
)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_files(tensors: dict[str, Tensor], kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"learned.{kind}"
    if kind == "bin":
        torch.save(tensors, file)
    else:
        save_file(tensors, file)
    encoder = load()
    add_embeddings(encoder, file, "<my-cat>")
    assert torch.equal(encoder.stack.shared.weight[-3:], vectors())


def test_faults(tmp_path: Path) -> None:
    encoder = load()
    tokenizer, table = encoder.tokenizer, encoder.stack.shared.weight
    save_file({"a": vectors(), "b": vectors(2)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"holds a, b, none of which is known for a T5's vectors; give key="):
        add_embeddings(encoder, tmp_path / "two.safetensors", "<my-cat>")
    with pytest.raises(ValueError, match=r"shape \[2, 768\]; this model takes \[vectors, 128\] or \[128\]"):
        add_embeddings(encoder, torch.ones(2, 768), "<my-cat>")
    with pytest.raises(ValueError, match="values that are not finite"):
        add_embeddings(encoder, torch.full((1, D_MODEL), float("inf")), "<my-cat>")
    for token, message in (
        ("", "can't be a word"),
        (" a", "can't be a word"),
        ("</s>", "is a token of the tokenizer already"),
        ("<extra_id_0>", "is a token of the tokenizer already"),
    ):
        with pytest.raises(ValueError, match=message):
            add_embeddings(encoder, vectors(), token)
    assert encoder.tokenizer is tokenizer and encoder.stack.shared.weight is table
    add_embeddings(encoder, tmp_path / "two.safetensors", "<my-cat>", key="b")
    with pytest.raises(ValueError, match="has vectors already"):
        add_embeddings(encoder, vectors(), "<my-cat>")
    with pytest.raises(ValueError, match="the same but for their case"):
        add_embeddings(encoder, vectors(), "<MY-cat>")
    with pytest.raises(ValueError, match="save its base instead"):
        encoder.tokenizer.serialized()


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer
# ---------------------------------------------------------------------------------------------------------------------

TEXTS = ["<w>", "a <w> b", "a<w>b", "  <w>  <w> ", "no word", "", "<w>, and <w>.", "“<w>” ü <w"]


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json"])
def test_the_text_between_is_tokenized_as_between_special_tokens(kind: str) -> None:
    base: SentencePieceTokenizer | JsonTokenizer = SentencePieceTokenizer(spiece_model())
    if kind == "tokenizer.json":
        base = JsonTokenizer(sentencepiece_to_tokenizer_json(spiece_model()))
    extended = base.extended(["<w>"])
    own = extended.encode("<w>", add_eos=False)
    assert len(own) == 1
    words = PlaceholderTokenizer(base, {"<w>": own})
    assert words(TEXTS) == extended(TEXTS)
    assert words(TEXTS, 3) == extended(TEXTS, 3)


def test_bytes() -> None:
    tokenizer = PlaceholderTokenizer(ByteTokenizer(), {"<w>": [384, 385]})
    assert tokenizer.encode("a <w>") == [100, 35, 384, 385, 1]
    assert tokenizer.encode("<w></s>") == [384, 385, 1]
    assert tokenizer.decode([100, 384, 385, 101]) == "a <w> b"
    assert tokenizer.vocab_size == 386
