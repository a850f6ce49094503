"""Shards of a caption set: right embeddings, in few bytes, the same whoever makes them."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")

import pyarrow as pa
from toy_captions import captions, digests, made, order, planned, with_a_damaged_row, with_a_vocabulary, write_captions
from toy_loras import toy_lora, write_style

from nai_t5_core import TextEncoder
from nai_t5_core.datasets import coding
from nai_t5_core.datasets.arrow import MissingPackageError
from nai_t5_core.datasets.coding import coder
from nai_t5_core.datasets.reading import EmbeddingDataset
from nai_t5_core.datasets.recipe import Keeping
from nai_t5_core.datasets.shard_files import DamagedShardError, Encoded, ShardFile, write_shard
from nai_t5_core.datasets.storing import pack_rows, reduce_rows, unpack_rows
from nai_t5_core.datasets.worker import Progress, Worker
from nai_t5_core.weights.examine import find_tokenizer_for

TEXTS = captions(40)

# Families of each padding policy; sd3's and ltx-video's pads are tokens, hidream's and chroma's are computed and read.
FAMILIES = ["wan", "glm-image", "stable-audio", "ltx-video", "hidream", "chroma", "audioldm2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_the_encoder(family: str, tmp_path: Path) -> None:
    texts = dict(list(TEXTS.items())[:9])
    folder = made(order(family), tmp_path / "set", write_captions(tmp_path / "a.jsonl", texts))
    dataset, encoder = EmbeddingDataset(folder.path), TextEncoder.from_pretrained(device="cpu")
    for name, text in texts.items():
        alone = encoder.encode([text], family)
        states, count = dataset[name]
        expected = alone.hidden_states[0, : len(states)].to(torch.bfloat16)
        # In a batch with others, products may be summed in another order.
        torch.testing.assert_close(states, expected, rtol=2**-7, atol=2**-8)
        assert not alone.hidden_states[0, len(states) :].any(), "rows are missing"
        assert count == int(alone.attention_mask[0].sum())


def test_a_lora_is_in_the_set_and_in_its_settings(tmp_path: Path) -> None:
    config = TextEncoder.from_pretrained(device="cpu").stack.config
    lora = str(write_style("kohya, third", toy_lora(config), tmp_path))
    file = write_captions(tmp_path / "a.jsonl", {"x": "a red fox in the snow"})
    with_lora = order(encoder=replace(order().encoder, loras=((lora, 0.5),)))
    states, _ = EmbeddingDataset(made(with_lora, tmp_path / "set", file).path)["x"]
    expected = TextEncoder.from_pretrained(device="cpu", loras=[(lora, 0.5)]).encode(["a red fox in the snow"], "wan")
    assert states.equal(expected.unpadded()[0].bfloat16())
    with pytest.raises(ValueError, match=r"encoder.loras is .* there and \[\] now"):
        planned(order(), tmp_path / "set", file)


def test_each_prompt_is_encoded_once(tmp_path: Path) -> None:
    told: list[Progress] = []
    made(order(), tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS), told=told.append)
    tokenizer = find_tokenizer_for(None)
    assert sum(progress.tokens for progress in told) == sum(map(tokenizer.count, set(TEXTS.values())))


# ---------------------------------------------------------------------------------------------------------------------
# Prompts that fail, and memory that ends
# ---------------------------------------------------------------------------------------------------------------------


def test_a_prompt_that_fails_is_listed_and_the_others_are_encoded(tmp_path: Path) -> None:
    encoder, word = with_a_damaged_row(tmp_path)
    texts = {"good": "two old dogs", "bad": f"{word} sleep", "also good": "warm snow"}
    folder = made(order(encoder=encoder), tmp_path / "set", write_captions(tmp_path / "a.jsonl", texts))
    (reason,) = ShardFile(folder.shard(0)).failures.values()
    assert "shared.weight holds values that are not finite" in reason
    dataset = EmbeddingDataset(folder.path)
    assert all(dataset[name][0].isfinite().all() for name in ("good", "also good"))
    with pytest.raises(ValueError, match=r"has no embedding, since it failed: shared.weight"):
        dataset["bad"]


def test_a_prompt_outside_the_vocabulary_is_listed_and_the_others_are_encoded(tmp_path: Path) -> None:
    tokenizer = find_tokenizer_for(None)
    texts = {"one": "two old dogs", "two": "warm snow", "three": "a red fox"}
    beyond = max(max(tokenizer.encode(text)) for text in texts.values())
    expected = [name for name, text in texts.items() if beyond in tokenizer.encode(text)]
    encoder = with_a_vocabulary(tmp_path, beyond)
    folder = made(order(encoder=encoder), tmp_path / "set", write_captions(tmp_path / "a.jsonl", texts))
    (reason,) = ShardFile(folder.shard(0)).failures.values()
    assert f"token id {beyond} is outside the vocabulary" in reason
    dataset = EmbeddingDataset(folder.path)
    assert [
        name for name, length in zip(dataset.ids.to_pylist(), dataset.lengths(), strict=True) if not length
    ] == expected


def test_a_shard_of_nothing_but_failures_is_none(tmp_path: Path) -> None:
    encoder, word = with_a_damaged_row(tmp_path)
    file = write_captions(tmp_path / "a.jsonl", {"a": f"{word} sleep", "b": f"two {word}"})
    with pytest.raises(ValueError, match=r"all 2 prompts of shard 0 fail, the first since shared.weight holds values"):
        made(order(encoder=encoder), tmp_path / "set", file)
    assert digests(tmp_path / "set") == {}


def test_an_error_that_is_no_prompts_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def embed(self: Worker, prompts: Any, kept: list[int], start: int, stop: int) -> torch.Tensor:
        raise ValueError("the kernels are of another version")

    monkeypatch.setattr(Worker, "embed", embed)
    with pytest.raises(ValueError, match="the kernels are of another version"):
        made(order(), tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS))
    assert digests(tmp_path / "set") == {}


WANT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError("there is no memory left for the T5's activations"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", WANT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_the_token_budget_is_halved_where_memory_ends(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = made(order(), tmp_path / "one", write_captions(tmp_path / "a.jsonl", TEXTS))
    planner, plan = planned(order(), tmp_path / "two", tmp_path / "a.jsonl")
    planner.folder.shards_folder.mkdir()
    worker = Worker(planner.folder, plan.recipe, order().encoder.load().stack, token_budget=64)
    embed, refused = worker.embed, []

    def as_if_small(prompts: Any, kept: list[int], start: int, stop: int) -> torch.Tensor:
        if sum(kept[start:stop]) > 20:
            refused.append(stop - start)
            raise error
        return embed(prompts, kept, start, stop)

    monkeypatch.setattr(worker, "embed", as_if_small)
    worker.run(range(len(plan.shards)))
    assert worker.token_budget == 16
    assert len(refused) == 2
    one, two = EmbeddingDataset(expected.path), EmbeddingDataset(tmp_path / "two")
    for name in TEXTS:
        torch.testing.assert_close(one[name][0], two[name][0], rtol=2**-7, atol=2**-8)


def test_scales_that_are_tightened_midway_end_the_run(tmp_path: Path) -> None:
    planner, plan = planned(order(), tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS))
    stack = order().encoder.load().stack
    worker = Worker(planner.folder, plan.recipe, stack)
    stack.scales = replace(stack.scales, embedding=0.5)
    with pytest.raises(ValueError, match=r"scales were tightened, which changes the embeddings; .* nai-t5 calibrate"):
        worker.run([0])


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------


def as_of_a_t5(rows: int = 2048, width: int = 1024) -> torch.Tensor:
    """Rows with channels of very different sizes, as T5's outputs have them."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(torch.randn(width, generator=generator))
    sizes[:4] *= 40
    return (torch.randn(rows, width, generator=generator) * sizes).bfloat16()


def write(file: Path, rows: torch.Tensor, keeping: Keeping, prompt: int = 32) -> ShardFile:
    count = len(rows) // prompt
    keys = torch.arange(count * 32, dtype=torch.int64).to(torch.uint8).view(count, 32)
    offsets = torch.arange(count + 1) * prompt
    write_shard(file, Encoded(rows, offsets, torch.full((count,), prompt).int(), keys, {}), keeping)
    return ShardFile(file)


@pytest.mark.parametrize(
    ("store", "compress", "most_bytes", "most_error"),
    [
        ("bfloat16", "none", 1.01, 0.0),
        ("bfloat16", "zlib", 0.75, 0.0),
        ("bfloat16", "zstd", 0.75, 0.0),
        ("int8", "none", 0.52, 0.012),
        ("float8", "none", 0.52, 0.03),
        ("int8", "zlib", 0.50, 0.012),
        ("int8", "zstd", 0.50, 0.012),
    ],
)
def test_bytes_and_errors_of_what_is_stored(
    store: Any, compress: Any, most_bytes: float, most_error: float, tmp_path: Path
) -> None:
    rows = as_of_a_t5()
    file = tmp_path / "shard.safetensors"
    shard = write(file, rows, Keeping(store, compress))
    read = torch.cat([shard.rows(place, torch.float32) for place in range(len(shard))])
    error = (read - rows.float()).norm() / rows.float().norm()
    assert error <= most_error
    assert file.stat().st_size / (rows.numel() * 2) <= most_bytes


def test_int8_keeps_small_channels_beside_large_ones() -> None:
    rows = as_of_a_t5()
    read = reduce_rows(rows, "int8").read(torch.float32)
    errors = (read - rows.float()).norm(dim=0) / rows.float().norm(dim=0)
    assert errors.max() < 0.02


@pytest.mark.parametrize("store", ["int8", "float8"])
def test_rows_and_channels_of_zeros_stay(store: Any) -> None:
    rows = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert reduce_rows(rows, store).read(torch.float32).equal(rows)


def test_packed_bytes_are_mantissas_with_signs_and_then_coded_exponents() -> None:
    rows = torch.tensor([[1.0, -1.0, 1.5, 0.0]]).bfloat16()
    packed = pack_rows(rows, coder("zlib"))
    assert packed[:4] == bytes([0, 1, 0x80, 0])
    assert zlib.decompress(packed[4:], -15) == bytes([127, 127, 127, 0])
    packed = pack_rows(rows, coder("zstd"))
    assert packed[:4] == bytes([0, 1, 0x80, 0])
    assert pa.decompress(packed[4:], 4, "zstd", asbytes=True) == bytes([127, 127, 127, 0])


@pytest.mark.parametrize("compress", ["zlib", "zstd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_all_bits_come_back(dtype: torch.dtype, compress: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(256, 256)
    rows = every.view(dtype) if dtype == torch.bfloat16 else every.to(torch.int8).view(dtype)
    packed = memoryview(pack_rows(rows, coder(compress)))
    back = unpack_rows(packed, (256, 256), dtype, coder(compress))
    assert back.view(torch.uint8).equal(rows.contiguous().view(torch.uint8))
    back.zero_()


@pytest.mark.parametrize("compress", ["zlib", "zstd"])
def test_coded_bytes_that_are_damaged_are_told_or_are_others_of_the_same_number(compress: str) -> None:
    """Nothing else comes out: no crash, no bytes that were never written, none too many."""
    by, plain = coder(compress), bytes(range(250)) * 8
    coded = by.code(memoryview(plain))
    assert by.decode(memoryview(coded), len(plain)) == plain
    damaged = [coded[:size] for size in range(len(coded))]
    damaged += [coded[:place] + bytes([coded[place] ^ 0x55]) + coded[place + 1 :] for place in range(len(coded))]
    told = 0
    for one in damaged:
        try:
            assert len(by.decode(memoryview(one), len(plain))) == len(plain)
        except ValueError:
            told += 1
    assert told >= len(coded)
    for size in (len(plain) - 1, len(plain) + 1):
        with pytest.raises(ValueError, match=r"\S"):
            by.decode(memoryview(coded), size)


@pytest.mark.parametrize("compress", ["zlib", "zstd"])
def test_a_damaged_block_is_told_with_what_mends_it(compress: str, tmp_path: Path) -> None:
    file = tmp_path / "shard.safetensors"
    shard = write(file, as_of_a_t5(64), Keeping("bfloat16", compress))  # type: ignore[arg-type]
    content = bytearray(file.read_bytes())
    begin = shard._begin + shard._places["rows"].begin + 32 * 1024
    content[begin : begin + 64] = bytes(64)
    file.write_bytes(content)
    with pytest.raises(DamagedShardError, match=r"shard.safetensors is damaged: .* precompute verify sets it aside"):
        ShardFile(file).rows(0)


def test_a_shard_of_a_newer_version_is_told_as_such(tmp_path: Path) -> None:
    file = tmp_path / "shard.safetensors"
    write(file, as_of_a_t5(64), Keeping("bfloat16", "zlib"))
    file.write_bytes(file.read_bytes().replace(b'"compress":"zlib"', b'"compress":"lzma"'))
    with pytest.raises(DamagedShardError, match="it is compressed by 'lzma', and this version knows zlib, zstd"):
        ShardFile(file)


def test_a_pyarrow_without_zstandard_is_told_before_anything_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_captions(tmp_path / "a.jsonl", TEXTS)
    shard = write(tmp_path / "shard.safetensors", as_of_a_t5(64), Keeping("bfloat16", "zstd"))
    monkeypatch.setattr(coding, "_CODERS", {"zstd": coding.Zstandard()})
    monkeypatch.setattr(pa, "Codec", SimpleNamespace(is_available=lambda name: False))
    with pytest.raises(MissingPackageError, match=r"built without Zstandard; .* make sets with --compress zlib"):
        planned(order(compress="zstd"), tmp_path / "set", file)
    assert not (tmp_path / "set").exists()
    with pytest.raises(MissingPackageError, match="built without Zstandard"):
        ShardFile(shard.file).rows(0)


def test_the_file_is_what_the_documents_say(tmp_path: Path) -> None:
    """Read here by the format's definition, and not by our reader."""
    folder = made(order(store="int8"), tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS))
    from safetensors.numpy import load_file

    tensors = load_file(folder.shard(0))
    assert sorted(tensors) == ["channels", "keys", "offsets", "rows", "scales", "tokens"]
    dtypes = {name: str(tensor.dtype) for name, tensor in tensors.items()}
    assert dtypes == {**dict.fromkeys(("channels", "scales"), "float32"), "keys": "uint8", "offsets": "int64"} | {
        "rows": "int8",
        "tokens": "int32",
    }
    place = 2
    start, stop = tensors["offsets"][place : place + 2]
    values = tensors["rows"][start:stop] * tensors["scales"][start:stop, None] * tensors["channels"]
    read = ShardFile(folder.shard(0)).rows(place, torch.float32).numpy()
    np.testing.assert_allclose(read, values, rtol=1e-6)


DAMAGE = {
    "cut off": lambda content: content[:-1],
    "too long": lambda content: content + b"x",
    "empty": lambda content: b"",
    "no header": lambda content: b"\xff" * 64,
    "another file": lambda content: (2).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_made_again(kind: str, tmp_path: Path) -> None:
    file = write_captions(tmp_path / "a.jsonl", TEXTS)
    folder = made(order(), tmp_path / "set", file)
    before = digests(folder.path)
    folder.shard(1).write_bytes(DAMAGE[kind](folder.shard(1).read_bytes()))
    with pytest.raises(ValueError, match=r"00001.safetensors is damaged or missing"):
        ShardFile(folder.shard(1))
    told: list[Progress] = []
    made(order(), tmp_path / "set", file, told=told.append)
    assert [progress.written for progress in told if progress.written is not None] == [1]
    assert digests(folder.path) == before


def test_a_full_disk_leaves_what_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_captions(tmp_path / "a.jsonl", TEXTS)
    expected = digests(made(order(), tmp_path / "one", file).path)
    room = iter([10**9, 10**9])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=next(room, 10)))
    with pytest.raises(ValueError, match=r"needs 0.00 GB and its disk has 0.00 GB free; make room"):
        made(order(), tmp_path / "two", file)
    assert digests(tmp_path / "two").items() < expected.items()
    assert len(digests(tmp_path / "two")) == 2
    monkeypatch.undo()
    assert digests(made(order(), tmp_path / "two", file).path) == expected
