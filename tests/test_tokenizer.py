"""Tokenizers against SentencePiece itself and against transformers; every known disagreement is pinned as it is."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nai_t5_core.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    sentencepiece_to_tokenizer_json,
    tokenizer_from_bytes,
    tokenizer_json_to_sentencepiece,
)
from nai_t5_core.tokenizer.sentencepiece_format import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
    extend_sentencepiece,
    read_fields,
    write_field,
    write_piece,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real tokenizers and prompts in ../shared/data")

CORPUS = """
A red fox walks across the snow at sunrise, and the long shadows of the trees reach the frozen river.
An oil painting of a lighthouse on a cliff, with waves breaking below and seagulls circling above.
The old man reads a newspaper in a small cafe while rain falls on the street outside.
Two dogs play with a ball in the park; a child in a yellow coat laughs and claps.
Photograph of a glass bottle on a wooden table, soft light from the left, shallow depth of field.
A city skyline at night, neon signs, 1920s cars, wet asphalt, reflections in the puddles.
Portrait of a woman with curly hair, 35mm film, grain, 4k, highly detailed.
The cat sat on the mat, then it jumped out of the window and ran through the garden.
""".strip().splitlines()

# Nothing in these depends on the version of transformers.
PLAIN = [
    "",
    " ",
    "   ",
    "a",
    " a ",
    "the cat",
    "the  cat   sat",
    "the\ncat\n\nsat\n",
    "\tthe\tcat\r\nsat",
    "the\u00a0cat\u3000sat\u2028on\u2009it",
    "naïve café",
    "cafe\u0301",
    "ﬁre Ａ ① ½ cup",
    "日本語 한국어 مرحبا",
    "a fox 🦊, 👨\u200d👩\u200d👧 and 🇫🇷",
    "“quotes” … ™ – —",
    "a\x00b\x01c\x7fd\u200be\ufefff\u00adg",
    "▁",
    "a▁b",
    "▁▁the ▁ cat",
    "<extra_id_0>",
    "the <extra_id_0> cat <extra_id_1>",
    " <extra_id_99> ",
    "<extra_id_100> <extra_id_> <EXTRA_ID_0> < extra_id_0>",
    "</s>",
    "the cat </s> sat </s>",
    "<pad> the <unk> cat <pad>",
    "<extra_id_0><extra_id_1></s></s>",
    "Hello, World! " * 40,
]
# transformers 5 puts a "▁" in front of a word behind a special token and splits at U+0085, older ones do neither.
ONLY_5 = ["a<extra_id_0>b", "the</s>cat", "<pad>the", "<unk>the<unk>cat", "a\x85b"]


@pytest.fixture(scope="module")
def toy_model() -> bytes:
    return train(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@pytest.fixture(scope="module")
def toy(toy_model: bytes) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(toy_model)


@pytest.fixture(scope="module")
def toy_json(toy_model: bytes) -> JsonTokenizer:
    return JsonTokenizer(sentencepiece_to_tokenizer_json(toy_model))


@pytest.fixture(scope="module")
def real_json() -> JsonTokenizer:
    return JsonTokenizer((DATA / "t5_tokenizer" / "tokenizer.json").read_bytes())


@pytest.fixture(scope="module")
def real_spm() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(
        tokenizer_json_to_sentencepiece((DATA / "t5_tokenizer" / "tokenizer.json").read_bytes())
    )


def train(vocab_size: int = 200, **options: Any) -> bytes:
    """A small SentencePiece model of CORPUS."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return model.getvalue()


def reference(folder: Path) -> Callable[[str], list[int]]:
    """Ids as transformers' fast T5 tokenizer gives them for the tokenizer.json in `folder`."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.T5TokenizerFast.from_pretrained(str(folder))
    return lambda text: tokenizer(text, truncation=False).input_ids


def reference_is_5() -> bool:
    transformers = pytest.importorskip("transformers")
    return int(transformers.__version__.split(".")[0]) >= 5


def write_folder(folder: Path, tokenizer_json: bytes, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(tokenizer_json)
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def prompts() -> list[str]:
    return (DATA / "prompts" / "parti_half.txt").read_text(encoding="utf-8").splitlines()


def random_texts(count: int, seed: int) -> Iterator[str]:
    """Letters, white space, marks, any script, emoji, control characters and special tokens, mixed."""
    rng = random.Random(seed)
    ranges = [(0x61, 0x7A), (0x300, 0x36F), (0x80, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0x1FAFF), (0, 0x1F)]
    fixed = [" ", " ", "\n", "\u3000", "a", "the", "ing", "▁", "<", "<extra_id_0>", "</s>", "<pad>", "<unk>"]
    for _ in range(count):
        characters = (
            rng.choice(fixed) if rng.random() < 0.4 else chr(rng.randint(*rng.choice(ranges)))
            for _ in range(rng.randint(1, 20))
        )
        yield "".join(characters)


# ---------------------------------------------------------------------------------------------------------------------
# The SentencePiece file format
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "value", "expected"),
    [
        (1, 5, b"\x08\x05"),
        (35, 300, b"\x98\x02\xac\x02"),
        (41, -1, b"\xc8\x02" + b"\xff" * 9 + b"\x01"),
        (2, 1.5, b"\x15\x00\x00\xc0\x3f"),
        (1, "▁a", b"\x0a\x04\xe2\x96\x81a"),
        (3, b"", b"\x1a\x00"),
    ],
)
def test_fields_are_written_to_the_byte(number: int, value: int | float | str | bytes, expected: bytes) -> None:
    assert write_field(number, value) == expected
    assert [found for found, _ in read_fields(expected)] == [number]


def test_piece_is_written_to_the_byte() -> None:
    assert write_piece("ab", -1.0, NORMAL) == b"\x0a\x09\x0a\x02ab\x15\x00\x00\x80\xbf"
    assert write_piece("ab", -1.0, CONTROL) == b"\x0a\x0b\x0a\x02ab\x15\x00\x00\x80\xbf\x18\x03"


@pytest.mark.parametrize("message", [b"\x0a", b"\x0a\x05ab", b"\x08\xff", b"\x0b\x00", b"hello world"])
def test_reading_no_protobuf_raises(message: bytes) -> None:
    with pytest.raises(ValueError, match="byte"):
        list(read_fields(message))


def test_model_is_read_as_sentencepiece_reads_it(toy_model: bytes) -> None:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=toy_model)
    model = SentencePieceModel.parse(toy_model)
    assert [text for text, _, _ in model.pieces] == [processor.id_to_piece(i) for i in range(len(processor))]
    assert [score for _, score, _ in model.pieces] == [processor.get_score(i) for i in range(len(processor))]
    assert [kind for _, _, kind in model.pieces[:4]] == [CONTROL, CONTROL, UNKNOWN, NORMAL]
    assert (model.model_type, model.add_dummy_prefix, model.remove_extra_whitespaces) == ("unigram", True, True)
    assert (model.byte_fallback, model.whitespace_as_suffix, model.pad_piece) == (False, False, "<pad>")
    assert len(model.charsmap) > 1000


# ---------------------------------------------------------------------------------------------------------------------
# Ids on a small model
# ---------------------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_sentencepiece_and_an_end_token(toy: SentencePieceTokenizer, toy_model: bytes) -> None:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=toy_model)
    for line in CORPUS:
        assert toy.encode(line) == [*processor.encode(line), 1]
        assert toy.encode(line, add_eos=False) == processor.encode(line)
        assert toy.count(line) == len(processor.encode(line)) + 1
    assert (toy.pad_token_id, toy.eos_token_id, toy.unk_token_id) == (0, 1, 2)


def test_extra_ids_follow_the_pieces_in_reverse_order(toy: SentencePieceTokenizer, toy_json: JsonTokenizer) -> None:
    assert toy.vocab_size == toy.file_size + 100 == toy_json.vocab_size
    for tokenizer in (toy, toy_json):
        assert tokenizer.encode("<extra_id_0>") == [toy.vocab_size - 1, 1]
        assert tokenizer.encode("<extra_id_99>", add_eos=False) == [toy.file_size]


@pytest.mark.parametrize("text", PLAIN + ONLY_5)
def test_both_files_give_the_same_ids(text: str, toy: SentencePieceTokenizer, toy_json: JsonTokenizer) -> None:
    assert toy.encode(text) == toy_json.encode(text)
    assert toy.decode(toy.encode(text)) == toy_json.decode(toy.encode(text))
    assert toy.decode(toy.encode(text), False) == toy_json.decode(toy.encode(text), False)


def test_both_files_give_the_ids_of_transformers(
    toy: SentencePieceTokenizer, toy_json: JsonTokenizer, tmp_path: Path
) -> None:
    expected = reference(write_folder(tmp_path, toy_json.serialized()[1]))
    for text in CORPUS + PLAIN + (ONLY_5 if reference_is_5() else []):
        assert toy.encode(text) == expected(text), ascii(text)
        assert toy_json.encode(text) == expected(text), ascii(text)


def test_decoding_gives_the_text_back(toy: SentencePieceTokenizer, toy_json: JsonTokenizer) -> None:
    for line in CORPUS:
        assert toy.decode(toy.encode(line)) == line == toy_json.decode(toy.encode(line))
    ids = toy.encode("the <extra_id_0> cat")
    assert toy.decode(ids) == "the cat"
    assert toy.decode(ids, skip_special_tokens=False) == "the<extra_id_0> cat</s>"
    assert toy.decode([-1, 10_000, *ids]) == toy_json.decode([10_000, *ids]) == "the cat"
    assert toy.decode([]) == toy_json.decode([]) == ""


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------

PROMPTS = ["the cat", "", "Two dogs play with a ball in the park"]


@pytest.fixture(params=["sentencepiece", "tokenizer.json", "bytes"])
def any_tokenizer(request: pytest.FixtureRequest, toy: SentencePieceTokenizer, toy_json: JsonTokenizer) -> Tokenizer:
    return {"sentencepiece": toy, "tokenizer.json": toy_json, "bytes": ByteTokenizer()}[request.param]


def test_batch_is_padded_to_the_longest_row(any_tokenizer: Tokenizer) -> None:
    batch = any_tokenizer(PROMPTS)
    assert len({len(row) for row in batch.input_ids + batch.attention_mask}) == 1
    for prompt, row, mask, count in zip(
        PROMPTS, batch.input_ids, batch.attention_mask, batch.token_counts, strict=True
    ):
        assert row[:count] == any_tokenizer.encode(prompt)
        assert set(row[count:]) <= {any_tokenizer.pad_token_id}
        assert mask == [1] * count + [0] * (len(row) - count)
    assert batch.full_counts == batch.token_counts == [any_tokenizer.count(prompt) for prompt in PROMPTS]
    assert batch.truncated == [False] * 3
    assert batch.cut_text == [""] * 3
    assert batch.input_ids[1][0] == any_tokenizer.eos_token_id


def test_batch_without_padding_is_ragged(any_tokenizer: Tokenizer) -> None:
    batch = any_tokenizer(PROMPTS, pad_to=None)
    assert batch.input_ids == [any_tokenizer.encode(prompt) for prompt in PROMPTS]
    assert batch.attention_mask == [[1] * len(row) for row in batch.input_ids]


def test_batch_padded_to_a_length(any_tokenizer: Tokenizer) -> None:
    batch = any_tokenizer(PROMPTS, max_length=6, pad_to=8)
    assert [len(row) for row in batch.input_ids] == [8] * 3
    assert max(batch.token_counts) == 6
    assert any_tokenizer(tuple(PROMPTS), max_length=6, pad_to=8) == batch


def test_truncation_keeps_the_start_and_the_end_token(any_tokenizer: Tokenizer) -> None:
    full = any_tokenizer.encode(PROMPTS[2])
    for max_length in range(1, len(full) + 2):
        batch = any_tokenizer([PROMPTS[2]], max_length)
        if max_length >= len(full):
            assert batch.input_ids == [full] and batch.truncated == [False] and batch.cut_text == [""]
        else:
            assert batch.input_ids == [[*full[: max_length - 1], any_tokenizer.eos_token_id]]
            assert batch.truncated == [True]
            assert batch.token_counts == [max_length]
        assert batch.full_counts == [len(full)]


def test_cut_text_starts_where_the_kept_tokens_end(toy: SentencePieceTokenizer, toy_json: JsonTokenizer) -> None:
    text = "the cat   sat\non the mat, ünd the <extra_id_0> cat"
    for tokenizer in (toy, toy_json):
        for kept in ("", "the", "the cat", "the cat   sat\non", "the cat   sat\non the mat, ünd the <extra_id_0>"):
            batch = tokenizer([text], max_length=tokenizer.count(kept))
            assert batch.input_ids == [tokenizer.encode(kept)]
            assert batch.cut_text == [text[len(kept) :].lstrip()]


def test_cut_text_within_a_word(toy: SentencePieceTokenizer, toy_json: JsonTokenizer) -> None:
    text = "über qzqzq"
    for max_length in range(1, toy.count(text)):
        assert toy([text], max_length).cut_text == toy_json([text], max_length).cut_text
    assert toy([text], toy.count(text) - 1).cut_text == ["q"]
    # One character became several tokens: it counts as cut off until all of them are kept.
    assert ByteTokenizer()(["aü"], 3).cut_text == ["ü"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a cat",), r"prompts is a str \('a cat'\), not a list"),
        ((b"a cat",), "prompts is a bytes"),
        ((None,), "prompts is a NoneType"),
        (([],), "list of prompts is empty"),
        ((["a", 3],), r"prompt 1 is a int \('3'\), not a str"),
        ((["a", None],), "prompt 1 is a NoneType"),
        ((["a"], 0), "max_length=0 leaves no room for the end token"),
        ((["a", "the long cat"], None, 3), "pad_to=3 is less than the .* tokens of prompt 1: pad to at least"),
        ((["a"], None, "max_length"), "pad_to='max_length' is neither a number"),
    ],
)
def test_wrong_calls_raise(any_tokenizer: Tokenizer, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        any_tokenizer(*arguments)


def test_encoding_no_string_raises(any_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="the prompt is a list"):
        any_tokenizer.encode(["a"])  # type: ignore[arg-type]


ANY_TEXT = st.text(st.characters(exclude_categories=())) | st.lists(
    st.sampled_from(["a", "the", " ", "\n", "é", "e\u0301", "½", "🦊", "</s>", "<pad>", "<unk>", "<extra_id_0>", "▁"])
).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT, max_length=st.integers(1, 12))
def test_any_text_is_tokenized(
    text: str, max_length: int, toy: SentencePieceTokenizer, toy_json: JsonTokenizer
) -> None:
    for tokenizer in (toy, toy_json, ByteTokenizer()):
        full = tokenizer.encode(text)
        assert tokenizer.count(text) == len(full)
        assert all(0 <= i < tokenizer.vocab_size for i in full)
        batch = tokenizer([text], max_length, pad_to=max_length)
        count = batch.token_counts[0]
        assert count <= max_length == len(batch.input_ids[0])
        assert batch.full_counts == [len(full)]
        assert batch.truncated == [count < len(full)]
        assert batch.input_ids[0][: count - 1] == full[: count - 1]
        assert batch.input_ids[0][count - 1] == tokenizer.eos_token_id
        assert text.endswith(batch.cut_text[0])
        assert bool(batch.cut_text[0]) == batch.truncated[0]
        tokenizer.decode(full)


# ---------------------------------------------------------------------------------------------------------------------
# ByT5
# ---------------------------------------------------------------------------------------------------------------------


def test_byte_ids() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aü") == [100, 198, 191, 1]
    assert tokenizer.encode("<extra_id_0><extra_id_124>") == [259, 383, 1]
    assert tokenizer.decode([100, 198, 191, 1]) == "aü"
    assert tokenizer.decode([100, 259, 1], skip_special_tokens=False) == "a<extra_id_0></s>"
    assert tokenizer.decode([198, 100, -1, 384]) == "a"


@pytest.mark.filterwarnings("ignore:This sequence already has")
def test_byte_ids_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    expected = transformers.ByT5Tokenizer()
    ours = ByteTokenizer()
    assert (ours.pad_token_id, ours.eos_token_id, ours.vocab_size) == (0, 1, len(expected))
    glued = ["a </s> b", "a\n</s>\tb", " <pad> x <unk> ", "</s></s>", "a</s>", "a <extra_id_7> b", "<extra_id_125>"]
    for text in PLAIN + ONLY_5 + glued + list(random_texts(300, seed=1)):
        assert ours.encode(text) == expected(text).input_ids, ascii(text)
        if not text.endswith("</s></s>"):
            truncated = expected(text, max_length=4, truncation=True).input_ids
            assert ours([text], 4).input_ids[0] == truncated, ascii(text)
    for text in CORPUS:
        assert ours.decode(ours.encode(text)) == expected.decode(expected(text).input_ids, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------------------------
# Conversion
# ---------------------------------------------------------------------------------------------------------------------


def test_conversion_there_and_back(toy_model: bytes, toy: SentencePieceTokenizer) -> None:
    as_json = sentencepiece_to_tokenizer_json(toy_model)
    again = tokenizer_json_to_sentencepiece(as_json)
    before, after = SentencePieceModel.parse(toy_model), SentencePieceModel.parse(again)
    assert after.pieces[: len(before.pieces)] == before.pieces
    assert after.pieces[len(before.pieces)] == ("<extra_id_99>", 0.0, USER_DEFINED)
    assert after.charsmap == before.charsmap
    assert sentencepiece_to_tokenizer_json(again) == as_json
    tokenizer = SentencePieceTokenizer(again)
    assert tokenizer.vocab_size == tokenizer.file_size == toy.vocab_size
    for text in CORPUS + PLAIN + ONLY_5:
        assert tokenizer.encode(text) == toy.encode(text), ascii(text)


def test_umt5_has_300_extra_ids() -> None:
    model = b"".join(
        [
            *(
                write_piece(text, 0.0, kind)
                for text, kind in (("<pad>", CONTROL), ("</s>", CONTROL), ("<unk>", UNKNOWN))
            ),
            *(write_piece(f"▁{i}", -10.0, NORMAL) for i in range(256_000 - 3)),
            write_field(2, write_field(40, 2) + write_field(42, 1) + write_field(43, 0)),
        ]
    )
    tokenizer = SentencePieceTokenizer(model)
    assert tokenizer.vocab_size == 256_300
    assert tokenizer.encode("<extra_id_0> 7 <extra_id_299>") == [256_299, 10, 256_000, 1]


def test_piece_kinds_and_flags_of_a_json(toy_json: JsonTokenizer) -> None:
    data = json.loads(toy_json.serialized()[1])
    vocab = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["<0x0A>", 0.0], ["▁a", -1.0], ["b", -2.5]]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    data["added_tokens"] = [
        {"id": 0, "content": "<pad>", **plain, "special": True},
        {"id": 7, "content": "<extra_id_0>", **plain, "special": True},
    ]
    data["model"] |= {"vocab": vocab, "byte_fallback": True}
    data["normalizer"] = None
    data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": False}
    model = SentencePieceModel.parse(tokenizer_json_to_sentencepiece(json.dumps(data).encode()))
    assert model.pieces == [
        ("<pad>", 0.0, CONTROL),
        ("</s>", 0.0, CONTROL),
        ("<unk>", 0.0, UNKNOWN),
        ("<0x0A>", 0.0, BYTE),
        ("▁a", -1.0, NORMAL),
        ("b", -2.5, NORMAL),
        ("<unused_6>", -2.5, UNUSED),
        ("<extra_id_0>", 0.0, USER_DEFINED),
    ]
    assert model.byte_fallback and model.charsmap == b""
    assert not model.add_dummy_prefix and not model.remove_extra_whitespaces


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "of type BPE can't become"),
        ({"model": {"vocab": {"a": 0}, "merges": []}}, "of type BPE can't become"),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": [["</s>", 0.0]]}}, "no unknown token"),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]}, "added_tokens": []}, "no end token"),
        ({"model": None}, "no 'model' with a 'vocab'"),
        ({"normalizer": {"type": "Lowercase"}}, "no normalizer .*Lowercase"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "no pre-tokenizer .*ByteLevel"),
    ],
)
def test_json_that_sentencepiece_cannot_express_raises(
    toy_json: JsonTokenizer, change: dict[str, Any], message: str
) -> None:
    data = json.loads(toy_json.serialized()[1]) | change
    with pytest.raises(ValueError, match=message):
        tokenizer_json_to_sentencepiece(json.dumps(data).encode())


def test_no_json_raises() -> None:
    with pytest.raises(ValueError, match="3 bytes are no json"):
        tokenizer_json_to_sentencepiece(b"abc")


def test_sentencepiece_that_json_cannot_express_raises(toy_model: bytes) -> None:
    bpe = train(model_type="bpe")
    with pytest.raises(ValueError, match="type bpe can't become"):
        sentencepiece_to_tokenizer_json(bpe)
    suffix = toy_model + write_field(2, write_field(24, 1))
    with pytest.raises(ValueError, match="whitespace as suffix"):
        sentencepiece_to_tokenizer_json(suffix)
    with pytest.raises(ValueError, match="no end piece"):
        sentencepiece_to_tokenizer_json(write_piece("a", 0.0, UNKNOWN))
    with pytest.raises(ValueError, match="no pieces"):
        sentencepiece_to_tokenizer_json(b"")


# ---------------------------------------------------------------------------------------------------------------------
# Storing and loading
# ---------------------------------------------------------------------------------------------------------------------


def test_serialized_tokenizers_come_back(any_tokenizer: Tokenizer) -> None:
    kind, content = any_tokenizer.serialized()
    again = tokenizer_from_bytes(kind, content)
    assert type(again) is type(any_tokenizer) and again.kind == kind
    assert again(PROMPTS) == any_tokenizer(PROMPTS)
    assert repr(again) == repr(any_tokenizer)


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("spiece", b"", "unknown tokenizer kind 'spiece'.*known are"),
        ("sentencepiece", b"hello", "5 bytes are no SentencePiece model"),
        ("sentencepiece", b"", "0 bytes are no SentencePiece model"),
        ("tokenizer.json", b"{}", "2 bytes are no tokenizer.json"),
    ],
)
def test_wrong_content_raises(kind: str, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_from_bytes(kind, content)


def test_tokenizers_without_end_token_raise(toy_json: JsonTokenizer) -> None:
    with pytest.raises(ValueError, match="eos_id is -1"):
        SentencePieceTokenizer(train(eos_id=-1, bos_id=-1))
    content = toy_json.serialized()[1].replace(b"</s>", b"<end>")
    with pytest.raises(ValueError, match="no token '</s>'"):
        JsonTokenizer(content)


def test_files_are_recognised_by_content(toy_model: bytes, toy_json: JsonTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(toy_model)
    (tmp_path / "b.model").write_bytes(toy_json.serialized()[1])
    (tmp_path / "c").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert load_tokenizer(tmp_path / "a.json").kind == "sentencepiece"
    assert load_tokenizer(str(tmp_path / "b.model")).kind == "tokenizer.json"
    assert load_tokenizer(tmp_path / "c").kind == "bytes"


@pytest.mark.parametrize("name", ["spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "tokenizer.json"])
def test_folders_in_the_hugging_face_layout(
    name: str, toy_model: bytes, toy_json: JsonTokenizer, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(toy_json.serialized()[1] if name.endswith("json") else toy_model)
    assert load_tokenizer(tmp_path).encode(CORPUS[0]) == toy_json.encode(CORPUS[0])
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "pad_token": "<pad>"}')
    assert load_tokenizer(tmp_path).serialized() == load_tokenizer(tmp_path / name).serialized()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert load_tokenizer(tmp_path).kind == "bytes"


def test_folder_config_adds_tokens_and_names_the_pad_token(toy_model: bytes, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(toy_model)
    size = SentencePieceTokenizer(toy_model).file_size
    config: dict[str, Any] = {"extra_ids": 7}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).vocab_size == size + 7
    assert load_tokenizer(tmp_path).encode("<extra_id_0> <extra_id_6>") == [size + 6, size, 1]

    config["added_tokens_decoder"] = {
        "0": {"content": "<pad>"},
        str(size + 1): {"content": "<extra_id_0>"},
        str(size): {"content": "<filler>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<filler>"}}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.pad_token_id) == (size + 2, size)
    assert tokenizer.encode("<extra_id_0> <filler>") == [size + 1, size, 1]
    assert tokenizer_from_bytes(*tokenizer.serialized()).pad_token_id == size

    config["added_tokens_decoder"] = {str(size + 9): {"content": "<filler>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"ids \[{size + 9}\], but the tokenizer's file ends at {size + 7}"):
        load_tokenizer(tmp_path)


def test_folder_config_of_a_json(toy_json: JsonTokenizer, tmp_path: Path) -> None:
    size = toy_json.vocab_size
    added = {str(size): {"content": "<filler>"}}
    folder = write_folder(tmp_path, toy_json.serialized()[1], pad_token="<filler>", added_tokens_decoder=added)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token_id, tokenizer.vocab_size) == (size, size + 1)
    assert tokenizer.encode("<filler> the cat") == [size, *toy_json.encode("the cat")]
    assert tokenizer_from_bytes(*tokenizer.serialized()).pad_token_id == size
    write_folder(tmp_path, toy_json.serialized()[1], pad_token="<new>")
    assert load_tokenizer(tmp_path).pad_token_id == size
    write_folder(tmp_path, toy_json.serialized()[1], pad_token="</s>")
    assert load_tokenizer(tmp_path).pad_token_id == 1


def test_padding_and_truncation_inside_a_json_are_ignored(toy_json: JsonTokenizer) -> None:
    data = json.loads(toy_json.serialized()[1])
    data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    assert JsonTokenizer(json.dumps(data).encode()).encode(CORPUS[0]) == toy_json.encode(CORPUS[0])


def test_unreadable_paths_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"can't read a tokenizer from .*nothing.*No such file"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "weights.bin").write_bytes(b"\x00\x01\x02" * 50)
    with pytest.raises(ValueError, match=r"weights.bin' is no T5 tokenizer: .* Give a tokenizer.json"):
        load_tokenizer(tmp_path / "weights.bin")
    with pytest.raises(ValueError, match=r"no tokenizer in .* holds \['weights.bin'\], but none of"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"d_model": 8}')
    with pytest.raises(ValueError, match=r"config.json' is no T5 tokenizer"):
        load_tokenizer(tmp_path / "config.json")
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config.json' is no json object"):
        load_tokenizer(tmp_path)


def test_import_loads_no_torch_and_no_tokenizer_library() -> None:
    command = "import sys, nai_t5_core.tokenizer; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert not {"torch", "sentencepiece", "tokenizers", "transformers", "google.protobuf"} & set(done.stdout.split())


# ---------------------------------------------------------------------------------------------------------------------
# The real files
# ---------------------------------------------------------------------------------------------------------------------


@needs_data
def test_real_ids_are_those_of_transformers(real_json: JsonTokenizer, real_spm: SentencePieceTokenizer) -> None:
    expected = reference(DATA / "t5_tokenizer")
    words = " ".join(prompts()).split()
    long_text = " ".join(words[i % len(words)] for i in range(5000))
    for text in prompts() + PLAIN + [long_text] + (ONLY_5 if reference_is_5() else []):
        ids = expected(text)
        assert real_json.encode(text) == ids, ascii(text[:80])
        assert real_spm.encode(text) == ids, ascii(text[:80])
    assert len(prompts()) == 816
    assert real_json.vocab_size == real_spm.vocab_size == 32100
    assert real_spm.encode("A cat <extra_id_0>") == [71, 1712, 32099, 1]


@needs_data
def test_real_truncation_is_that_of_transformers(real_json: JsonTokenizer, real_spm: SentencePieceTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    expected = transformers.T5TokenizerFast.from_pretrained(str(DATA / "t5_tokenizer"))
    texts = prompts()[:60]
    for max_length in (1, 2, 7, 20):
        theirs = expected(texts, max_length=max_length, padding="max_length", truncation=True)
        for ours in (real_json, real_spm):
            batch = ours(texts, max_length, pad_to=max_length)
            assert batch.input_ids == theirs.input_ids
            assert batch.attention_mask == theirs.attention_mask
            for prompt, cut, row in zip(texts, batch.cut_text, batch.input_ids, strict=True):
                kept = prompt.removesuffix(cut)
                if cut and kept.endswith(" "):  # cut between words, or behind the lone "▁" (3) of the next one
                    assert row in (ours.encode(kept), [*ours.encode(kept, add_eos=False), 3, 1])


@needs_data
def test_real_vocabulary_without_extra_ids_is_completed(real_spm: SentencePieceTokenizer) -> None:
    bare = SentencePieceModel.parse(real_spm.serialized()[1])
    model = b"".join(write_piece(*piece) for piece in bare.pieces[:32000])
    model += write_field(2, write_field(40, 2) + write_field(42, 1) + write_field(43, 0))
    model += write_field(3, write_field(2, bare.charsmap))
    tokenizer = SentencePieceTokenizer(model)
    assert (tokenizer.file_size, tokenizer.vocab_size) == (32000, 32100)
    for text in prompts()[:200] + PLAIN:
        assert tokenizer.encode(text) == real_spm.encode(text)


@needs_data
def test_random_texts_differ_only_in_how_they_are_normalized(
    real_json: JsonTokenizer, real_spm: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """Ids agree wherever SentencePiece and the tokenizers library agree about the normalized text."""
    from tokenizers.normalizers import Precompiled

    expected = reference(DATA / "t5_tokenizer") if reference_is_5() else real_json.encode
    charsmap = Precompiled(SentencePieceModel.parse(real_spm.serialized()[1]).charsmap)
    different = 0
    for text in random_texts(3000, seed=2):
        ids = expected(text)
        assert real_json.encode(text) == ids, ascii(text)
        if real_spm.encode(text) != ids:
            different += 1
            parts = [part for _, part, special in real_spm._parts(text) if special is None]
            theirs = ["".join(f"▁{word}" for word in charsmap.normalize_str(part).split()) for part in parts]
            assert theirs != [real_spm._model.normalize(part) for part in parts], ascii(text)
    assert 0 < different < 300


@needs_data
def test_pile_t5_tokenizer_as_its_file_says() -> None:
    tokenizer = load_tokenizer(DATA / "pile_t5_tokenizer")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.vocab_size == 32000
    assert tokenizer.encode("A cat") == [319, 6635, 2]
    assert tokenizer.encode("🦊\n") == [29871, 243, 162, 169, 141, 13, 2]
    assert tokenizer.decode(tokenizer.encode("A  cat, 🦊\n")) == "A  cat, 🦊\n"
    assert tokenizer(["A cat", ""]).input_ids == [[319, 6635, 2], [2, 1, 1]]


# ---------------------------------------------------------------------------------------------------------------------
# Known disagreements, as docs/tokenizers.md lists them
# ---------------------------------------------------------------------------------------------------------------------


def test_disagreement_marks_on_a_character_that_is_replaced(
    toy: SentencePieceTokenizer, toy_json: JsonTokenizer
) -> None:
    """Class 1: the tokenizers library replaces a character together with the marks on it, SentencePiece keeps them."""
    text = "the\u00a0\u0363cat"
    assert toy_json.encode(text) == toy_json.encode("the cat")
    assert toy.encode(text) == [*toy.encode("the", False), *toy.encode("\u0363cat")] != toy.encode("the cat")


@pytest.mark.parametrize(
    ("text", "tokenizers_library", "sentencepiece"),
    [
        ("\u3000\u0363", " ", " \u0363"),  # the mark is lost
        ("e\u0302\u0301", "ê", "ế"),  # the second accent is lost
        ("\u1112\u1161\u11ab", "\u1112\u1161\u11ab", "한"),  # not composed: the cluster has more than 5 bytes
    ],
)
def test_disagreement_normalized_clusters(
    text: str, tokenizers_library: str, sentencepiece: str, toy_model: bytes, toy: SentencePieceTokenizer
) -> None:
    """Class 1, seen from the normalized text."""
    from tokenizers.normalizers import Precompiled

    charsmap = Precompiled(SentencePieceModel.parse(toy_model).charsmap)
    assert charsmap.normalize_str(f"a{text}" if text[0] == "\u3000" else text).removeprefix("a") == tokenizers_library
    assert toy._model.normalize(f"a{text}").removeprefix("▁a").replace("▁", " ") == sentencepiece


@needs_data
def test_disagreement_equally_good_splits(real_json: JsonTokenizer, real_spm: SentencePieceTokenizer) -> None:
    """Class 2: two splits of the same score, one with x first and one with xx first."""
    x, xx = real_spm.token_id("x"), real_spm.token_id("xx")
    assert real_json.encode("kxxxb")[2:4] == [x, xx]
    assert real_spm.encode("kxxxb")[2:4] == [xx, x]


def test_disagreement_byte_fallback(tmp_path: Path) -> None:
    """Class 3: we spell unknown characters in bytes where the file says so, transformers 5 makes them unknown."""
    model = train(vocab_size=450, byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    spm, as_json = SentencePieceTokenizer(model), JsonTokenizer(sentencepiece_to_tokenizer_json(model))
    fox = [int(spm.token_id(f"<0x{byte:02X}>") or 0) for byte in "🦊".encode()]
    assert spm.encode("🦊") == as_json.encode("🦊") == [*spm.encode("", False), spm.token_id("▁"), *fox, 1]
    assert spm.decode(spm.encode("a 🦊")) == as_json.decode(spm.encode("a 🦊")) == "a 🦊"
    if reference_is_5():
        expected = reference(write_folder(tmp_path, as_json.serialized()[1]))
        assert expected("🦊") == [spm.token_id("▁"), 2, 1]


def test_disagreement_a_byte_piece_spelled_out() -> None:
    """Class 4: the tokenizers library takes the text <0x41> for the byte piece, SentencePiece for six characters."""
    model = train(vocab_size=450, byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    spm, as_json = SentencePieceTokenizer(model), JsonTokenizer(sentencepiece_to_tokenizer_json(model))
    assert spm.token_id("<0x41>") in as_json.encode("<0x41>")
    assert spm.token_id("<0x41>") not in spm.encode("<0x41>")


def test_disagreement_the_file_as_transformers_4_runs_it(toy_json: JsonTokenizer) -> None:
    """Class 5: a tokenizer.json run as it stands (transformers 4) gives no "▁" to a word behind a special token."""
    from tokenizers import Tokenizer as Backend

    data = json.loads(toy_json.serialized()[1])
    data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    data["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            data["normalizer"],
            {"type": "Strip", "strip_left": False, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
        ],
    }
    content = json.dumps(data).encode()
    ours, as_it_stands = JsonTokenizer(content), Backend.from_buffer(content)
    for text in CORPUS + PLAIN:
        assert ours.encode(text) == toy_json.encode(text) == as_it_stands.encode(text).ids
    for text in ONLY_5:
        assert ours.encode(text) == toy_json.encode(text) != as_it_stands.encode(text).ids, ascii(text)


def test_disagreement_surrogates(toy: SentencePieceTokenizer, toy_json: JsonTokenizer, tmp_path: Path) -> None:
    """Class 6: a lone surrogate is U+FFFD to us, an error to transformers."""
    for tokenizer in (toy, toy_json, ByteTokenizer()):
        assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert toy(["a\ud800b cat"], 2).cut_text == ["\ud800b cat"]
    expected = reference(write_folder(tmp_path, toy_json.serialized()[1]))
    with pytest.raises((TypeError, UnicodeEncodeError)):
        expected("a\ud800b")


@pytest.mark.filterwarnings("ignore:This sequence already has")
def test_disagreement_two_end_tokens_at_the_limit() -> None:
    """Class 8: ByT5 in transformers cuts a prompt with two written end tokens although it fits."""
    transformers = pytest.importorskip("transformers")
    assert ByteTokenizer()(["ab</s></s>"], 4).input_ids == [[100, 101, 1, 1]]
    assert transformers.ByT5Tokenizer()("ab</s></s>", max_length=4, truncation=True).input_ids == [100, 101, 1]


@needs_data
def test_disagreement_pile_t5_white_space() -> None:
    """Class 7: leading spaces and runs of spaces are kept for Pile-T5, as its file says and transformers 4 does."""
    tokenizer = load_tokenizer(DATA / "pile_t5_tokenizer")
    assert tokenizer.encode(" a") == [29871, 263, 2]  # transformers 5: [263, 2]
    assert tokenizer.encode("a  b") == [263, 29871, 289, 2]  # transformers 5: [263, 259, 29890, 2]
    assert tokenizer.encode("a</s>b") == [263, 2, 289, 2]  # transformers 5: [263, 2, 29890, 2]


def test_extending_a_model_appends_fields(toy_model: bytes) -> None:
    extended = extend_sentencepiece(toy_model, ["<extra_id_0>", "<new>"], pad_piece="<new>")
    model = SentencePieceModel.parse(extended)
    assert model.pieces[-2:] == [("<extra_id_0>", 0.0, USER_DEFINED), ("<new>", 0.0, CONTROL)]
    assert model.pad_piece == "<new>"
    assert extend_sentencepiece(toy_model) == toy_model
