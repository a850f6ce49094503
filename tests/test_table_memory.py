"""The table of embeddings of a GGUF file: memory holds none of it, however many rows prompts look up."""

from __future__ import annotations

import copy
import mmap
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import encoder_part, write_file
from conftest import random_state
from toy_gguf import write_gguf

from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.backends.quantised.kinds import WEIGHT, QuantisedWeight
from nai_t5_core.backends.quantised.packing import PackedKind
from nai_t5_core.bench.gguf_files import write_gguf as write_packed
from nai_t5_core.bench.kinds_files import write_kind
from nai_t5_core.facts.config import T5Config
from nai_t5_core.weights.convert_quantised import convert_quantised
from nai_t5_core.weights.gguf_files import open_gguf
from nai_t5_core.weights.load import load_encoder

CONFIG = T5Config(
    vocab_size=96, d_model=256, d_kv=64, d_ff=256, num_heads=4, num_layers=1, num_decoder_layers=0, gated=True
)
# A table of 35 MB, whose pages are large ones where the system has them.
LARGE = CONFIG.model_copy(update={"vocab_size": 32_128, "d_model": 1024})
IDS = torch.tensor([[90, 3, 7, 3, 1]])
PAGES = Path("/proc/self/pagemap")
_IS_PRESENT = np.uint64(63)


def resident(tensor: torch.Tensor) -> int:
    """Pages of a tensor that this process has in memory."""
    first = tensor.data_ptr() // mmap.PAGESIZE
    count = (tensor.data_ptr() + tensor.nbytes - 1) // mmap.PAGESIZE + 1 - first
    return int((np.fromfile(PAGES, np.uint64, count, offset=8 * first) >> _IS_PRESENT).sum())


def table_of(stack: Any) -> QuantisedWeight:
    weight: QuantisedWeight = stack.shared.form.weight
    assert list(weight.parts) == [WEIGHT]
    return weight


@pytest.mark.skipif(not PAGES.exists(), reason="this system does not tell which pages a process has")
@torch.no_grad()
def test_a_long_prompt_brings_nothing_of_the_table_into_memory(tmp_path: Path) -> None:
    stack = load_encoder(write_kind("Q8_0", tmp_path, LARGE), "bfloat16", "cpu")
    table = table_of(stack).parts[WEIGHT]
    assert table.nbytes > 30e6
    assert stack(torch.arange(0, 32_000, 64)[None]).isfinite().all()
    assert resident(table) == 0
    assert int(table[20_000].sum()) and resident(table) > 0  # the mapping is there, and looked at


@pytest.mark.skipif(not PAGES.exists(), reason="this system does not tell which pages a process has")
@pytest.mark.parametrize("kind", ["BF16", "F16", "F32"])
def test_plain_matrices_are_mapped(kind: str, tmp_path: Path) -> None:
    """So that those that are joined or put in panels are not in memory twice, in parts of what is freed."""
    state = random_state(CONFIG)
    path = write_packed(tmp_path / "t5.gguf", CONFIG, state, kind)
    table = open_gguf(path).tensors["token_embd.weight"].read()
    assert resident(table) == 0 and table.dtype == {"BF16": torch.bfloat16, "F16": torch.float16}.get(
        kind, torch.float32
    )
    assert torch.equal(table, state["shared.weight"].to(table.dtype)) and resident(table) > 0


@pytest.mark.parametrize("kind", GGML_KINDS)
def test_rows_are_those_of_the_mapped_table(kind: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "t5.gguf", random_state(CONFIG), kind)
    stack = load_encoder(path, "float32", "cpu")
    weight, ids = table_of(stack), torch.tensor([95, 0, 17, 17])
    assert weight.kind.name == kind and weight.read_rows is not None
    assert torch.equal(weight.read_rows(weight.parts[WEIGHT], ids), weight.parts[WEIGHT][ids])
    assert torch.equal(weight.rows(ids), weight.plain()[ids])


@pytest.mark.parametrize("kind", ["q8_0", "q4_k"])
def test_rows_of_a_file_of_our_own(kind: PackedKind, tmp_path: Path) -> None:
    source = write_file(tmp_path / "t5.safetensors", encoder_part(random_state(CONFIG)))
    convert_quantised(source, tmp_path / "own.safetensors", kind, encoder_only=True)
    weight, ids = table_of(load_encoder(tmp_path / "own.safetensors", "float32", "cpu")), torch.tensor([95, 0, 17])
    assert weight.read_rows is not None and weight.parts[WEIGHT].count_nonzero()
    assert torch.equal(weight.read_rows(weight.parts[WEIGHT], ids), weight.parts[WEIGHT][ids])  # type: ignore[arg-type]


@pytest.mark.parametrize("numbers", [[0, 96], [-1]])
def test_what_is_no_row_is_not_read(numbers: list[int], tmp_path: Path) -> None:
    """What lies before and behind the table is no part of it."""
    stack = load_encoder(write_gguf(tmp_path / "t5.gguf", random_state(CONFIG), "Q8_0"), "float32", "cpu")
    weight = table_of(stack)
    table, read_rows = weight.parts[WEIGHT], weight.read_rows
    assert read_rows is not None and read_rows(table, torch.tensor(numbers)) is None
    assert read_rows(table, torch.zeros(0, dtype=torch.int64)).shape == (0, 272)  # type: ignore[union-attr]


@torch.no_grad()
@pytest.mark.parametrize("change", ["another file", "no file"])
def test_a_file_that_goes_while_it_is_used(change: str, tmp_path: Path) -> None:
    """The mapping still has it."""
    path = write_gguf(tmp_path / "t5.gguf", random_state(CONFIG), "Q8_0")
    stack = load_encoder(path, "float32", "cpu")
    meant = stack(IDS)
    path.rename(tmp_path / "kept.gguf")
    if change == "another file":
        write_gguf(path, random_state(CONFIG, seed=1), "Q8_0")
    weight = table_of(stack)
    assert weight.read_rows is not None and weight.read_rows(weight.parts[WEIGHT], IDS[0]) is None
    assert torch.equal(stack(IDS), meant)


def test_a_file_that_becomes_shorter_is_told(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "t5.gguf", random_state(CONFIG), "Q8_0")
    stack = load_encoder(path, "float32", "cpu")
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match=r"t5.gguf has become shorter since it was opened; fetch it again"):
        table_of(stack).rows(IDS[0])


def moved_and_back(stack: Any) -> Any:
    """As from a device: into other memory of the CPU."""
    return stack._apply(lambda tensor: tensor.clone())


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, moved_and_back, lambda stack: pickle.loads(pickle.dumps(stack))])
def test_a_table_that_was_copied_into_memory_has_nothing_of_the_file(copied: Any, tmp_path: Path) -> None:
    """Which others may write into."""
    path = write_gguf(tmp_path / "t5.gguf", random_state(CONFIG), "Q8_0")
    stack = load_encoder(path, "float32", "cpu")
    meant = stack(IDS)
    other, own = copied(stack), write_gguf(tmp_path / "other.gguf", random_state(CONFIG, seed=1), "Q8_0").read_bytes()
    with path.open("r+b") as file:
        file.write(own)
    assert path.read_bytes() == own and torch.equal(other(IDS), meant)
