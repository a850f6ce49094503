"""Reading a caption set: by id, as batches, in DataLoader's workers, and by length."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pyarrow")

import pyarrow.parquet as pq
from torch.utils.data import DataLoader
from toy_captions import captions, made, order, planned, write_captions, write_rows

from nai_t5_core import EmbeddingDataset
from nai_t5_core.datasets.index import write_index
from nai_t5_core.datasets.reading import collate
from nai_t5_core.datasets.sampler import LengthSampler

TEXTS = captions(50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sets")
    return made(order(), place / "set", write_captions(place / "a.jsonl", TEXTS)).path


@pytest.fixture(scope="module")
def dataset(folder: Path) -> EmbeddingDataset:
    return EmbeddingDataset(folder)


def test_a_sample_is_its_states_and_their_number(dataset: EmbeddingDataset) -> None:
    assert len(dataset) == len(TEXTS)
    for name, text in TEXTS.items():
        states, count = dataset[name]
        assert states.shape == (count, 128) and states.dtype == torch.bfloat16
        others = [other for other, words in TEXTS.items() if words == text]
        assert all(dataset[other][0].equal(states) for other in others)


def test_what_is_read_can_be_written_to_and_changes_nothing(dataset: EmbeddingDataset) -> None:
    states, _ = dataset["clip/0003"]
    expected = states.clone()
    states.zero_()
    assert dataset["clip/0003"][0].equal(expected)


def test_a_batch_is_padded_with_zeros_and_masked(dataset: EmbeddingDataset) -> None:
    names = ["clip/0000", "clip/0006", "clip/0002"]
    states, mask = dataset.batch(names, pad_to=40, dtype=torch.float32)
    assert states.shape == (3, 40, 128) and states.dtype == torch.float32 and mask.dtype == torch.bool
    for place, name in enumerate(names):
        alone, count = dataset[name]
        assert states[place, :count].equal(alone.float())
        assert not states[place, count:].any()
        assert mask[place].tolist() == [True] * count + [False] * (40 - count)
    assert dataset.batch(names)[0].shape[1] == max(dataset[name][1] for name in names)


def test_numbers_stand_for_ids_of_their_digits(tmp_path: Path) -> None:
    rows = [{"caption": "one"}, {"caption": "two dogs"}, {"caption": "three"}]
    folder = made(order(id_column=None), tmp_path / "set", write_rows(tmp_path / "a.jsonl", rows))
    dataset = EmbeddingDataset(folder.path)
    assert dataset[1][0].equal(dataset["1"][0])
    (batch,) = DataLoader(dataset, batch_size=3, collate_fn=collate)
    assert batch[1].sum(dim=1).tolist() == [dataset[number][1] for number in range(3)]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_dataloaders_workers_read_the_same(context: str, dataset: EmbeddingDataset) -> None:
    sampler = LengthSampler(dataset, 8)
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=2, multiprocessing_context=context
    )
    sampler.set_epoch(0)
    read = list(loader)
    sampler.set_epoch(0)
    expected = [dataset.batch(names) for names in sampler]
    assert len(read) == len(expected) == len(sampler)
    for one, other in zip(read, expected, strict=True):
        assert one[0].equal(other[0]) and one[1].equal(other[1])


def test_a_data_set_can_be_sent(dataset: EmbeddingDataset) -> None:
    dataset["clip/0001"]
    again = pickle.loads(pickle.dumps(dataset))
    assert again["clip/0001"][0].equal(dataset["clip/0001"][0])


def test_an_epoch_has_every_sample_once_in_batches_of_like_lengths(dataset: EmbeddingDataset) -> None:
    sampler = LengthSampler(dataset, 8)
    epochs = [list(sampler) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    for batches in epochs:
        assert sorted(name for batch in batches for name in batch) == sorted(TEXTS)
        spread = sum(max(sizes) - min(sizes) for sizes in ([dataset[name][1] for name in batch] for batch in batches))
        assert spread <= max(dataset.lengths())
    sampler.set_epoch(1)
    assert list(sampler) == epochs[1]


def test_processes_share_an_epoch_evenly(dataset: EmbeddingDataset) -> None:
    parts = [list(LengthSampler(dataset, 8, rank=rank, world=3)) for rank in range(3)]
    assert {len(part) for part in parts} == {len(LengthSampler(dataset, 8, world=3))} == {3}
    assert {name for part in parts for batch in part for name in batch} == set(TEXTS)


def test_where_processes_are_more_than_batches_each_has_one(dataset: EmbeddingDataset) -> None:
    parts = [list(LengthSampler(dataset, 25, rank=rank, world=7)) for rank in range(7)]
    assert [len(part) for part in parts] == [len(LengthSampler(dataset, 25, world=7))] * 7 == [1] * 7
    assert {name for part in parts for batch in part for name in batch} == set(TEXTS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"batch_size": 0}, "batch_size=0; it must be 1 or more"),
        ({"batch_size": 2, "rank": 2, "world": 2}, "rank=2; it must be at most 1"),
    ],
)
def test_samplers_arguments_are_checked(arguments: dict[str, int], expected: str, dataset: EmbeddingDataset) -> None:
    with pytest.raises(ValueError, match=expected):
        LengthSampler(dataset, **arguments)


@pytest.mark.parametrize("name", ["clip/9999", "", "clip", 3, 2.5, None])
def test_an_id_that_is_not_there_is_a_key_error(name: Any, dataset: EmbeddingDataset) -> None:
    with pytest.raises(KeyError, match=r"no sample of|is no id"):
        dataset[name]


def test_batches_are_checked(dataset: EmbeddingDataset) -> None:
    with pytest.raises(ValueError, match="the batch is empty"):
        dataset.batch([])
    with pytest.raises(ValueError, match=r"pad_to=2, and the longest sample has \d+ rows"):
        dataset.batch(["clip/0006"], pad_to=2)


def test_a_folder_without_a_set_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no caption set \(no plan.json\); nai-t5 precompute makes one"):
        EmbeddingDataset(tmp_path)


def test_the_index_can_be_made_again(folder: Path, dataset: EmbeddingDataset) -> None:
    file = dataset.folder.index
    before = pq.read_table(file)
    file.unlink()
    assert EmbeddingDataset(folder)["clip/0001"][0].equal(dataset["clip/0001"][0])
    write_index(dataset.folder)
    assert pq.read_table(file).equals(before)


def test_an_index_of_other_shards_is_not_believed(dataset: EmbeddingDataset, tmp_path: Path) -> None:
    """Also where there are as many."""
    one_shard = order(shard_bytes=10**9)
    again = made(one_shard, tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS))
    others = {name: f"{text} of old" for name, text in TEXTS.items()}
    other = made(one_shard, tmp_path / "other", write_captions(tmp_path / "b.jsonl", others))
    again.index.write_bytes(other.index.read_bytes())
    states, count = EmbeddingDataset(again.path)["clip/0001"]
    # In a batch with others, products may be summed in another order.
    torch.testing.assert_close(states, dataset["clip/0001"][0], rtol=2**-7, atol=2**-8)
    assert count == dataset["clip/0001"][1]


def test_what_is_not_encoded_yet_is_told_and_left_out_of_batches(tmp_path: Path) -> None:
    file = write_captions(tmp_path / "a.jsonl", TEXTS)
    folder = made(order(), tmp_path / "set", file)
    planned(order(), tmp_path / "set", write_captions(tmp_path / "b.jsonl", {"new": "a caption of another file"}))
    dataset = EmbeddingDataset(folder.path)
    assert len(dataset) == len(TEXTS) + 1
    with pytest.raises(ValueError, match="'new' is not encoded yet; run nai-t5 precompute again"):
        dataset["new"]
    assert {name for batch in LengthSampler(dataset, 8) for name in batch} == set(TEXTS)


@pytest.mark.parametrize(
    "keeping", [{"store": "int8"}, {"store": "float8"}, {"compress": "zlib"}, {"compress": "zstd"}]
)
def test_every_kind_of_storage_is_read(keeping: dict[str, str], dataset: EmbeddingDataset, tmp_path: Path) -> None:
    folder = made(order(**keeping), tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS))
    other = EmbeddingDataset(folder.path)
    for name in TEXTS:
        expected, count = dataset[name]
        read, same_count = other[name]
        error = (read.float() - expected.float()).norm() / expected.float().norm()
        assert count == same_count and error <= {"int8": 0.015, "float8": 0.05}.get(keeping.get("store", ""), 0)
