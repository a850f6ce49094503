"""``inspect`` and ``parity`` know every kind that is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import random_state
from test_cli import Run, run  # noqa: F401 - a fixture
from toy_gguf import write_gguf
from toy_quantised import READ, quantised, write_quantised

from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.facts.config import T5Config

# Rows are whole blocks of every kind.
CONFIG = T5Config(vocab_size=300, d_model=256, d_kv=64, d_ff=512, num_heads=4, num_layers=1)
PROJECTIONS = 4 * 256 * 256 + 3 * 256 * 512


def write_kind(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    state = random_state(CONFIG)
    if kind in GGML_KINDS:
        return write_gguf(folder / "t5.gguf", state, kind, config=CONFIG)
    return write_quantised(folder / "t5.safetensors", quantised(state, READ[kind][1]))


@pytest.mark.parametrize("kind", [*READ, *GGML_KINDS])
def test_every_kind_is_told_and_measured(run: Run, tmp_path: Path, kind: str) -> None:  # noqa: F811
    path = write_kind(tmp_path, kind)
    told = READ[kind][0].removesuffix(" in blocks") if kind in READ else kind
    counts = run("inspect", path, "--json").json["dtypes"]
    counted = {name.removeprefix("torch."): count for name, count in counts.items()}
    # Of a GGUF file, the table of embeddings is in the kind as well.
    assert counted[told] == PROJECTIONS + (300 * 256 if kind in GGML_KINDS else 0)
    found = run("parity", path, "--dtypes", "float32", "--against", "", "--json")
    assert found.status == 0, found.stderr
    assert all(0 < difference["largest"] < 1e-4 for difference in found.json["differences"])
