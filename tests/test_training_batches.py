"""Batches: functions of their number, complete, and refused where the data is bad."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from checkpoints import spiece_model
from toy_training import CAPTIONS, PAIRS, rows_of, sections, write_data

from nai_t5_core.tokenizer import ByteTokenizer, Tokenizer, tokenizer_from_bytes
from nai_t5_core.training.batches import Batch, Batches, sentinel_ids


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_from_bytes("sentencepiece", spiece_model())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with texts, pairs and a tokenizer."""
    return write_data(tmp_path)


def test_sentinels_of_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert sentinel_ids(tokenizer).tolist() == list(range(4095, 3995, -1))
    assert sentinel_ids(ByteTokenizer()).tolist() == list(range(259, 384))


def test_a_vocabulary_without_sentinels(folder: Path) -> None:
    class PlainBytes(ByteTokenizer):
        _pattern = re.compile("</s>")

    with pytest.raises(ValueError, match="the vocabulary has no sentinels"):
        Batches(sections(folder, span_corruption=1), PlainBytes(), 0)
    assert rows_of(Batches(sections(folder, prefix=1), PlainBytes(), 0)(0))


def equal(a: Batch, b: Batch) -> bool:
    return rows_of(a) == rows_of(b)


def test_a_batch_is_a_function_of_its_number(folder: Path, tokenizer: Tokenizer) -> None:
    chosen = sections(folder, span_corruption=2, prefix=2, pairs=3)
    whole = Batches(chosen, tokenizer, seed=1)
    expected = [whole(number) for number in range(12)]
    later = Batches(chosen, tokenizer, seed=1)
    assert all(equal(later(number), expected[number]) for number in (11, 4, 7))
    assert not any(equal(Batches(chosen, tokenizer, seed=2)(number), expected[number]) for number in range(12))


def test_rows_and_padding(folder: Path, tokenizer: Tokenizer) -> None:
    batch = Batches(sections(folder, span_corruption=2, prefix=2, pairs=3), tokenizer, 0)(0)
    assert batch.input_ids.shape == batch.attention_mask.shape and len(batch.labels) == 7
    rows = rows_of(batch)
    assert all(inputs[-1] == targets[-1] == tokenizer.eos_token_id for inputs, targets in rows)
    assert not batch.input_ids[batch.attention_mask == 0].any()
    assert batch.targets == sum(len(targets) for _, targets in rows)
    texts = [tuple(tokenizer.decode(ids) for ids in row) for row in rows]
    assert all(f"{first} {second}" in CAPTIONS for first, second in texts[2:4])
    assert all(pair in PAIRS for pair in texts[4:])


def test_an_epoch_has_every_pair_once(folder: Path, tokenizer: Tokenizer) -> None:
    batches = Batches(sections(folder, pairs=1), tokenizer, 0)
    epochs = [[tokenizer.decode(rows_of(batches(5 * epoch + i))[0][0]) for i in range(5)] for epoch in range(4)]
    assert all(sorted(epoch) == sorted(question for question, _ in PAIRS) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_noise_is_drawn_anew(folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "captions.txt").write_text("a red cup and a blue cat on top of the wooden table")
    batches = Batches(sections(folder, span_corruption=1), tokenizer, 0)
    assert len({tuple(rows_of(batches(number))[0][0]) for number in range(20)}) > 5


def test_long_texts_are_cut_into_pieces(folder: Path, tokenizer: Tokenizer) -> None:
    text = " ".join(CAPTIONS)
    (folder / "captions.txt").write_text(text)
    section = sections(folder, prefix=1)[0].model_copy(update={"max_length": 8})
    batches = Batches([section], tokenizer, 0)
    ids = tokenizer.encode(text, add_eos=False)
    pieces = [ids[start : start + 7] for start in range(0, len(ids), 7)]
    found = [[*a[:-1], *b[:-1]] for number in range(len(pieces)) for a, b in rows_of(batches(number))]
    assert sorted(found) == sorted(pieces)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.txt", "a red cup\ncup\n", "captions.txt, line 2: 'cup' is a single token"),
        ("captions.txt", "\n \n", "captions.txt is empty"),
        ("captions.txt", None, "captions.txt cannot be read as UTF-8 text"),
        ("pairs.jsonl", '{"input": "a"}', 'pairs.jsonl, line 1: no object {"input"'),
        ("pairs.jsonl", '{"input": "a", "target": 3}', 'pairs.jsonl, line 1: no object {"input"'),
        ("pairs.jsonl", json.dumps({"input": "red " * 600, "target": "x"}), "line 1: 601 tokens, more than max_length"),
    ],
)
def test_bad_data(folder: Path, tokenizer: Tokenizer, name: str, content: str | None, message: str) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Batches(sections(folder, span_corruption=1, pairs=1), tokenizer, 0)
