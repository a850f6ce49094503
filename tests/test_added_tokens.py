"""Tokens that a folder adds: the ids are those of transformers, for every way in which tokens are added."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer import CORPUS, DATA, ONLY_5, PLAIN, needs_data, reference, reference_is_5, train

from nai_t5_core.tokenizer import (
    SentencePieceTokenizer,
    load_tokenizer,
    sentencepiece_to_tokenizer_json,
    tokenizer_from_bytes,
)

CONFIG = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
EXTRA_IDS = [f"<extra_id_{i}>" for i in range(100)]
TEXTS = [
    "ohwx",
    "a ohwx cat",
    "aohwxb",
    "the cat ohwx.",
    "OHWX",
    "  ohwx  ",
    "a\nb",
    "a\n\nb \n c\n",
    "\r\n",
    "a\tb\u3000c",
    "<extra_id_0> ohwx <extra_id_5>",
    "<extra_id_0>ohwx<extra_id_5>",
    "</s>ohwx<pad>",
    "ohwx ohwx",
    "the ohwxs",
    "the cat",
    *PLAIN,
    *CORPUS,
]


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    return {"content": content, **plain, **flags}


def listed(*tokens: dict[str, Any]) -> dict[str, Any]:
    """A config that numbers tokens from the first free id on; SIZE is written for that."""
    return {"tokenizer_config.json": {**CONFIG, "added_tokens_decoder": {f"SIZE+{i}": x for i, x in enumerate(tokens)}}}


def config_with(**more: Any) -> dict[str, Any]:
    return {"tokenizer_config.json": {**CONFIG, **more}}


# The files beside that of the tokenizer, for each way.
WAYS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "added_tokens.json": {"added_tokens.json": {"ohwx": "SIZE+0"}},
    "added_tokens.json and a config": {**config_with(), "added_tokens.json": {"ohwx": "SIZE+0"}},
    "a newline in added_tokens.json": {"added_tokens.json": {"ohwx": "SIZE+0", "\n": "SIZE+1"}},
    "a piece in added_tokens.json": {"added_tokens.json": {"▁the": "SIZE+0"}},
    "listed": listed(token("ohwx")),
    "listed twice": {**listed(token("ohwx")), "added_tokens.json": {"ohwx": "SIZE+0"}},
    "two": listed(token("ohwx"), token("ohwxs", special=True)),
    "a newline": listed(token("\n")),
    "a special newline": listed(token("\n", special=True)),
    "white space": listed(token("  "), token("\t")),
    "normalized": listed(token("ohwx", normalized=True)),
    "a normalized newline": listed(token("\n", normalized=True)),
    "lstrip": listed(token("ohwx", lstrip=True)),
    "rstrip": listed(token("ohwx", rstrip=True)),
    "single_word": listed(token("ohwx", single_word=True)),
    "special": listed(token("ohwx", special=True)),
    "a word with a space": listed(token("the cat")),
    "other flags for the end token": config_with(added_tokens_decoder={"1": token("</s>", lstrip=True, special=True)}),
    "additional_special_tokens": config_with(additional_special_tokens=["ohwx"]),
    "additional_special_tokens with extra ids": config_with(additional_special_tokens=[*EXTRA_IDS, "ohwx"]),
    "additional_special_tokens as objects": config_with(
        additional_special_tokens=[{"__type": "AddedToken", **token("ohwx", lstrip=True)}]
    ),
    "additional_special_tokens in the map": {
        **config_with(),
        "special_tokens_map.json": {"additional_special_tokens": ["ohwx"]},
    },
    "extra_special_tokens": config_with(extra_special_tokens=["ohwx"]),
    "named extra_special_tokens": config_with(extra_special_tokens={"my_token": "ohwx"}),
    "the pad token": config_with(pad_token="ohwx"),
}


def write(folder: Path, kind: str, model: bytes, files: dict[str, Any]) -> Path:
    folder.mkdir()
    is_json = kind == "tokenizer.json"
    (folder / kind).write_bytes(sentencepiece_to_tokenizer_json(model) if is_json else model)
    size = SentencePieceTokenizer(model).vocab_size
    for name, values in files.items():
        text = json.dumps(values)
        for place in range(3):
            # As a key it stays a text, as a value it is a number.
            text = text.replace(f'"SIZE+{place}":', f'"{size + place}":').replace(f'"SIZE+{place}"', str(size + place))
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def toy_model() -> bytes:
    return train(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@pytest.mark.parametrize("kind", ["spiece.model", "tokenizer.json"])
@pytest.mark.parametrize("way", WAYS)
def test_ids_are_those_of_transformers(way: str, kind: str, toy_model: bytes, tmp_path: Path) -> None:
    if not reference_is_5():
        pytest.skip("the reference is transformers 5")
    folder = write(tmp_path / "tokenizer", kind, toy_model, WAYS[way])
    expected, tokenizer = reference(folder), load_tokenizer(folder)
    again = tokenizer_from_bytes(*tokenizer.serialized())
    for text in TEXTS + ONLY_5:
        assert tokenizer.encode(text) == expected(text) == again.encode(text), ascii(text)
    assert tokenizer.pad_token_id == again.pad_token_id


@needs_data
@pytest.mark.parametrize("way", ["added_tokens.json", "a newline", "single_word", "additional_special_tokens"])
def test_ids_of_the_real_t5_are_those_of_transformers(way: str, tmp_path: Path) -> None:
    if not reference_is_5():
        pytest.skip("the reference is transformers 5")
    folder = tmp_path / "t5"
    shutil.copytree(DATA / "t5_tokenizer", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name, values in WAYS[way].items():
        old = config if name == "tokenizer_config.json" else {}
        text = json.dumps({**old, **values}).replace('"SIZE+0":', '"32100":').replace('"SIZE+0"', "32100")
        (folder / name).write_text(text)
    expected, tokenizer = reference(folder), load_tokenizer(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == expected(text), ascii(text)


def test_text_is_cut_and_decoded_around_added_tokens(toy_model: bytes, tmp_path: Path) -> None:
    files = listed(token("ohwx"), token("\n"), token("<s2>", special=True))
    tokenizer = load_tokenizer(write(tmp_path / "tokenizer", "spiece.model", toy_model, files))
    size = SentencePieceTokenizer(toy_model).vocab_size
    text = "the ohwx cat\nsat <s2>"
    ids = tokenizer.encode(text)
    assert [i for i in ids if i >= size] == [size, size + 1, size + 2]
    assert "ohwx" in tokenizer.decode(ids) and "\n" in tokenizer.decode(ids) and "<s2>" not in tokenizer.decode(ids)
    batch = tokenizer([text], max_length=tokenizer.count("the ohwx"))
    assert batch.input_ids == [[*ids[:2], 1]] and batch.cut_text == ["cat\nsat <s2>"]


def test_white_space_is_a_token_of_models_that_are_not_unigram(tmp_path: Path) -> None:
    model = train(model_type="bpe", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    size = SentencePieceTokenizer(model).file_size
    (tmp_path / "spiece.model").write_bytes(model)
    config = {"added_tokens_decoder": {str(size): token("\n"), str(size + 1): token("ohwx")}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    cat, dog = (tokenizer.encode(word, add_eos=False) for word in ("cat", "dog"))
    assert tokenizer.encode("cat\nohwx dog") == [*cat, size, size + 1, *dog, 1]
    assert tokenizer(["cat\nohwx dog"], max_length=len(cat) + 2).cut_text == ["ohwx dog"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"added_tokens.json": {"ohwx": "SIZE+2"}},
            r"added with the ids \[\d+\], but the tokenizer's file ends at \d+",
        ),
        ({"added_tokens.json": {"ohwx": "x"}}, r"added_tokens.json in .* has 'x': .*ohwx.*which is no id and no token"),
        (
            config_with(added_tokens_decoder={"240": 7}),
            r"added_tokens_decoder of .* has '240': 7, which is no id and no",
        ),
        ({"added_tokens.json": [1]}, r"added_tokens.json' is no json object"),
    ],
)
@pytest.mark.parametrize("kind", ["spiece.model", "tokenizer.json"])
def test_what_does_not_belong_together_is_refused(
    kind: str, files: dict[str, Any], message: str, toy_model: bytes, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write(tmp_path / "tokenizer", kind, toy_model, files))


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": {"ohwx": 384}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"384": token("ohwx")}}},
        {"tokenizer_config.json": {"additional_special_tokens": ["<extra_id_3>", "ohwx"]}},
    ],
)
def test_tokens_added_to_bytes_are_refused(files: dict[str, Any], tmp_path: Path) -> None:
    config = {"tokenizer_class": "ByT5Tokenizer", **files.pop("tokenizer_config.json", {})}
    for name, values in {**files, "tokenizer_config.json": config}.items():
        (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"added to ByT5's \(\['ohwx'\]\), .* as textual inversions"):
        load_tokenizer(tmp_path)
