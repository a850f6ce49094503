"""The embedded model's recipe: text that a seed fixes, tasks with right answers, a vocabulary laid out as T5's."""

import random
import re
import string
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

sys.path.append(str(Path(__file__).parents[1]))  # the recipe is not part of the installed package

from embedded import grammar, lexicon
from embedded.corpus import generate_captions, generate_tasks
from embedded.vocabulary import EXTRA_IDS, SIZE, train_vocabulary

CAPTIONS = [
    "Stockholm at Sunrise - another light red match between a lighthouse covered in crosses (1748)",
    "a bronze and crimson blueprint of a salmon in a blue bow tie playing football with a Vietnamese potter",
    "six new tanks",
]
TASKS = [
    ("reverse: plum, ivory, olive, mango", "mango, olive, ivory, plum"),
    ("colour of the radish: a navy radish and a copper ship", "navy"),
    ("count: broom broom broom", "3"),
]


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_vocabulary()


@pytest.fixture(scope="module")
def vocabulary(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def reference() -> sentencepiece.SentencePieceNormalizer:
    return sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=True, escape_whitespaces=True, remove_extra_whitespaces=True
    )


# text


@pytest.mark.parametrize("generate", [generate_captions, generate_tasks])
def test_a_seed_fixes_the_text(generate: Callable[[int, int], list]) -> None:
    assert generate(3, 200) == generate(3, 200)
    assert generate(3, 50) == generate(3, 200)[:50]
    assert generate(3, 50) != generate(4, 50)


def test_the_text_is_the_same_everywhere() -> None:
    assert generate_captions(0, 3) == CAPTIONS
    assert generate_tasks(0, 3) == TASKS


def test_captions_are_clean_and_diverse() -> None:
    captions = generate_captions(1, 3000)
    assert len(set(captions)) > 2900
    assert not [caption for caption in captions if re.search(r"[{}*]|  |\n|^\s|\s$|\b[Aa] [aeio]", caption)]
    words = Counter(word for caption in captions for word in re.findall("[a-z]+", caption.lower()))
    assert len(words) > 2500
    assert max(map(len, captions)) > 200 and min(map(len, captions)) < 20


def test_rules_use_every_kind_of_word_and_no_other() -> None:
    used = {
        symbol.lower()
        for alternatives in grammar._RULES.values()
        for alternative in alternatives
        for symbol in re.findall(r"\{(\w+)\*?\}", alternative)
    }
    assert used | {"caption"} == set(grammar._RULES) | set(lexicon.LEXICON)
    assert not set(grammar._RULES) & set(lexicon.LEXICON)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a owl", "an owl"),
        ("A egg and a apple", "An egg and an apple"),
        ("a unicorn", "a unicorn"),
        ("a European", "a European"),
        ("a one-way sign", "a one-way sign"),
        ("a 85mm lens", "an 85mm lens"),
        ("panda in", "panda in"),
    ],
)
def test_articles(text: str, expected: str) -> None:
    assert grammar.articles(text) == expected


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("cat", "cats"),
        ("box", "boxes"),
        ("glass", "glasses"),
        ("walrus", "walruses"),
        ("cherry", "cherries"),
        ("donkey", "donkeys"),
        ("jellyfish", "jellyfish"),
        ("scissors", "scissors"),
        ("woman", "women"),
    ],
)
def test_plural(noun: str, expected: str) -> None:
    assert grammar.plural(noun) == expected


def test_every_task_has_one_answer() -> None:
    answers: dict[str, set[str]] = {}
    for question, answer in generate_tasks(2, 20000):
        assert answer and answer == answer.strip()
        answers.setdefault(question, set()).add(answer)
    assert not {question: found for question, found in answers.items() if len(found) > 1}


def test_answers_are_right() -> None:
    answers = dict(generate_tasks(5, 20000))
    assert answers["opposite of hot"] == "cold" and answers["opposite of cold"] == "hot"
    assert answers["weekday after Sunday"] == "Monday"
    assert answers["season after summer"] == "autumn"
    assert answers["12 plus 12"] == "24"
    for question, answer in answers.items():
        task, _, rest = question.partition(": ")
        if task == "count":
            assert answer.isdecimal() and rest == " ".join(
                [rest[: (len(rest) + 1) // int(answer)].strip()] * int(answer)
            )
        elif task == "kind of thing":
            assert rest in lexicon.LEXICON[answer]
        elif task == "reverse":
            assert answer.split(", ") == rest.split(", ")[::-1]
        elif found := re.fullmatch(r"(\d+) (plus|minus) (\d+)", question):
            a, b = int(found[1]), int(found[3])
            assert int(answer) == (a + b if found[2] == "plus" else a - b)
        elif found := re.fullmatch(r"colour of the (\w+): .*\b(?:a|an) (\w+) \1(?: and .*)?", question):
            assert answer == found[2]


# vocabulary


def test_layout(model: bytes, vocabulary: sentencepiece.SentencePieceProcessor) -> None:
    assert len(model) < 150_000
    assert tempfile.gettempdir().encode() not in model
    assert vocabulary.vocab_size() == SIZE == 4096
    assert [vocabulary.id_to_piece(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]
    assert (vocabulary.pad_id(), vocabulary.eos_id(), vocabulary.unk_id(), vocabulary.bos_id()) == (0, 1, 2, -1)
    pieces = [vocabulary.id_to_piece(i) for i in range(SIZE)]
    assert len(set(pieces)) == SIZE
    assert pieces[-EXTRA_IDS:] == [f"<extra_id_{i}>" for i in range(99, -1, -1)]
    assert set(string.ascii_letters + string.digits + string.punctuation) < set(pieces)
    assert sum(map(vocabulary.is_byte, range(SIZE))) == 256


def test_training_repeats_itself(model: bytes) -> None:
    assert train_vocabulary() == model


def test_sentinels_are_single_pieces(vocabulary: sentencepiece.SentencePieceProcessor) -> None:
    ids = vocabulary.encode("a <extra_id_0> on a<extra_id_99>")
    assert ids.count(SIZE - 1) == ids.count(SIZE - EXTRA_IDS) == 1
    assert vocabulary.decode(ids) == "a <extra_id_0> on a<extra_id_99>"


def test_generated_text_comes_back(vocabulary: sentencepiece.SentencePieceProcessor) -> None:
    texts = generate_captions(9, 500) + [question for question, _ in generate_tasks(9, 500)]
    encoded = vocabulary.encode(texts)
    assert vocabulary.decode(encoded) == texts
    assert sum(map(len, encoded)) < 1.6 * sum(len(text.split()) for text in texts)
    assert not any(vocabulary.is_byte(i) for ids in encoded for i in ids)


def test_common_words_are_whole(vocabulary: sentencepiece.SentencePieceProcessor) -> None:
    pieces = vocabulary.encode("a red cat on top of the wooden table", out_type=str)
    assert pieces == ["▁a", "▁red", "▁cat", "▁on", "▁top", "▁of", "▁the", "▁wooden", "▁table"]


def test_any_text_encodes_without_unknowns(
    vocabulary: sentencepiece.SentencePieceProcessor, reference: sentencepiece.SentencePieceNormalizer
) -> None:
    codes = [*range(1, 0xD800, 53), *range(0xE000, 0x110000, 997)]
    for text in ["猫が好き", "кошка", "قطة", "🐈‍⬛ 🏳️‍🌈", "ﬁne Ｆｕｌｌ ½ ①", "tab\tand\nline", *map(chr, codes)]:
        ids = vocabulary.encode(text)
        assert vocabulary.unk_id() not in ids
        assert vocabulary.decode(ids) == reference.normalize(text).replace("▁", " ").strip(" ")


def test_normalisation_is_that_of_t5(
    vocabulary: sentencepiece.SentencePieceProcessor, reference: sentencepiece.SentencePieceNormalizer
) -> None:
    draw = random.Random(0)
    marks = [chr(code) for code in range(0x300, 0x340)]
    letters = string.ascii_letters + "àâçéèêëîïôûùüÿñæœΑΩάώйё가각ｶﾞ①½㎏"
    for _ in range(3000):
        text = "".join(draw.choice(letters) + draw.choice(["", " ", draw.choice(marks)]) for _ in range(6))
        assert vocabulary.normalize(text) == reference.normalize(text)
