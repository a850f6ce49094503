"""Load time and memory of files of each kind: the files are real, and so are processes that load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import every_set
from test_cli import Run, run  # noqa: F401

from nai_t5_core.backends.kernels.sets import InstructionSet
from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.backends.quantised.projections import QuantisedLinear
from nai_t5_core.bench import kinds as bench_kinds
from nai_t5_core.bench import kinds_loading
from nai_t5_core.bench.kinds import measure_kinds
from nai_t5_core.bench.kinds_files import FILE_KINDS, PLAIN, write_kind
from nai_t5_core.bench.kinds_loading import KindLoad, KindMemory, loading_table, measure_kind_loading
from nai_t5_core.bench.kinds_packing import BY_LLAMA_CPP, PACKINGS
from nai_t5_core.bench.speed.results import Spread
from nai_t5_core.facts.config import T5Config
from nai_t5_core.lora.live import LiveLinear
from nai_t5_core.weights.load import load_encoder

pytest.importorskip("gguf", reason="files of GGUF's kinds are written with it")

# Rows of whole blocks of any kind.
CONFIG = T5Config(
    vocab_size=96, d_model=256, d_kv=64, d_ff=512, num_heads=4, num_layers=2, num_decoder_layers=0, gated=True
)
# What a kind is called where it is read, if not as its file.
READ_AS = {
    "float8-blocks": "float8_e4m3fn in blocks",
    "int8-rotated": "int8, rotated in groups of 256",
    "int8-bitsandbytes": "int8 of bitsandbytes",
    "NF4": "NF4 of bitsandbytes",
    "NF4-nested": "NF4 of bitsandbytes",
    "FP4": "FP4 of bitsandbytes",
}
HAS_PROC = Path("/proc/self/clear_refs").exists()


@pytest.mark.parametrize("kind", [PLAIN, *FILE_KINDS])
def test_a_file_of_each_kind_is_read_as_that_kind(kind: str, tmp_path: Path) -> None:
    path = write_kind(kind, tmp_path, CONFIG)
    stack = load_encoder(path, "float32", "cpu")
    assert (stack.config.num_layers, stack.config.d_ff) == (2, 512)
    kinds = {
        form.weight.kind.name for part in stack.modules() if isinstance(part, QuantisedLinear) for form in part.forms
    }
    is_plain = kind in (PLAIN, "F16", "BF16")
    assert kinds == (set() if is_plain else {READ_AS.get(kind, kind)})
    with torch.no_grad():
        found = stack(torch.arange(24)[None] + 3)
    assert found.isfinite().all() and float(found.std()) > 0.1


def test_all_that_is_read_is_measured() -> None:
    assert set(GGML_KINDS) < set(FILE_KINDS)


@pytest.mark.parametrize(
    ("kinds", "d_model", "told"),
    [
        (["Q9"], 256, r"unknown kinds \['Q9'\]; allowed: Q8_0, "),
        (["Q8_0", "Q4_K"], 192, "rows of 192 numbers are no whole blocks of 256, as Q4_K has them"),
        (["NF4"], 32, "rows of 32 numbers are no whole blocks of 64, as NF4 has them"),
    ],
)
def test_what_cannot_be_written_is_refused_first(
    kinds: list[str], d_model: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds_loading, "write_kind", lambda *_: pytest.fail("a file was written"))
    config = CONFIG.model_copy(update={"d_model": d_model})
    with pytest.raises(ValueError, match=told):
        measure_kind_loading(config, kinds=kinds)


def test_loads_take_turns_and_files_are_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the children, whose figures are made up here."""
    loads: list[str] = []

    def made_up(code: str, arguments: dict[str, Any]) -> dict[str, Any]:
        source = Path(arguments["source"])
        there = {path.name for path in source.parent.iterdir()}
        assert {f"{PLAIN}.safetensors", source.name} <= there and len(there) <= 2
        size = source.stat().st_size
        if "forget_the_highest" in code:
            return {"after_load": size // 10, "loading": size, "encoding": [size, 2 * size], "own": 5}
        loads.append(source.stem)
        return {"load": 3.0 if source.stem == PLAIN else 1.0, "first": 1.0, "by": f"what computes {source.stem}"}

    monkeypatch.setattr(kinds_loading, "run_child", made_up)
    monkeypatch.setattr(kinds_loading, "_is_told", lambda: True)
    rows = measure_kind_loading(CONFIG, repeats=2, kinds=["Q8_0", "NF4"])
    assert loads == [*(PLAIN, "Q8_0") * 2, *(PLAIN, "NF4") * 2]
    assert [row.kind for row in rows] == [PLAIN, "Q8_0", "NF4"]
    assert [row.ratio.median for row in rows] == [1.0, 0.5, 0.5]
    assert [row.seconds.median for row in rows] == [4.0, 2.0, 2.0]
    assert [row.holds for row in rows] == [False] * 3
    assert json.loads(json.dumps(rows[1].to_dict()))["memory"]["loading"] == rows[1].file


@pytest.mark.parametrize(
    ("memory", "holds"),
    [
        (KindMemory(1000, 5000, (1000, 1050), 10), True),
        (KindMemory(1000, 1000, (1000, 1060), 10), False),
        (KindMemory(1060, 1000, (1000, 1000), 10), False),
        (None, None),
    ],
)
def test_what_holds(memory: KindMemory | None, holds: bool | None) -> None:
    row = KindLoad("Q8_0", 1000, Spread.of([1.0]), Spread.of([0.5]), memory, "kernels")
    assert row.holds is holds
    table, notes = loading_table([row])
    assert all(len(cells) == len(table.headings) for cells in table.rows)
    assert table.rows[0][-1] == {True: "yes", False: "NO", None: ""}[holds]
    assert notes == ["by kernels: Q8_0"]


def test_loads_by_the_command(run: Run, tmp_path: Path) -> None:  # noqa: F811
    options = ["--load", "--layers", "1", "--kinds", "Q8_0", "--repeats", "1", "--dtype", "float32", "--threads", "1"]
    file = tmp_path / "table.md"
    rows = run("bench-kinds", "t5-v1_1-small", *options, "--markdown", file, "--json").json["rows"]
    assert [row["kind"] for row in rows] == [PLAIN, "Q8_0"]
    assert all(row["seconds"]["median"] > 0 for row in rows) and rows[0]["file"] > 1.5 * rows[1]["file"]
    if HAS_PROC:
        assert all(row["memory"]["encoding"][1] >= row["memory"]["own"] > 0 for row in rows)
    assert "| Q8_0 | 0.0" in file.read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--load", "--against", "llama-cpp-python"], "--load and --against are two measurements"),
        (["--load", "--plot", "kinds.png"], "which --load does not measure; leave one of them out"),
        (["--against", "llama-cpp-python", "--products", "avx2"], "--products is not for --against"),
        (["--load", "--lora", "16"], "--lora is for the times of kinds by themselves, and not with --load"),
        (["--against", "llama-cpp-python", "--lora", "16"], "and not with --against; leave one of them out"),
        (["--lora", "-1"], "--lora -1; a rank is 1 or more, and 0 is none"),
        (["--load", "--kinds", "Q2_K"], "rows of 384 numbers are no whole blocks of 256, as Q2_K has them"),
    ],
)
def test_options_that_exclude_each_other(run: Run, options: list[str], told: str) -> None:  # noqa: F811
    refused = run("bench-kinds", "t5-v1_1-small", *options)
    assert refused.status == 2 and told in refused.stderr


@every_set
def test_kinds_by_a_set_that_is_named(instructions: InstructionSet) -> None:
    kinds = [kind for kind in PACKINGS if kind not in BY_LLAMA_CPP]
    rows = measure_kinds(CONFIG, torch.float32, (4,), 1, kinds, products=instructions.name)  # type: ignore[arg-type]
    plain, *quantised = (row.by for row in rows)
    assert plain.startswith(f"{instructions.title} kernels")
    assert set(quantised) == {f"{instructions.title} kernels, quantised weights"}


def test_kinds_beside_a_live_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every projection of what is timed has one; what errors are of has none."""
    ranks: list[set[int]] = []

    def looked_at(stacks: Any, *_: object) -> list[float]:
        lived = [part for stack in stacks for part in stack.modules() if isinstance(part, LiveLinear)]
        assert len(lived) == 7 * CONFIG.num_layers * len(stacks)
        ranks.append({len(part.down) for part in lived})
        return [1.0] * len(stacks)

    errors = [row.errors for row in measure_kinds(CONFIG, torch.float32, (4,), 1, ["Q8_0"])]
    monkeypatch.setattr(bench_kinds, "_milliseconds", looked_at)
    beside = measure_kinds(CONFIG, torch.float32, (4,), 1, ["Q8_0"], lora_rank=3)
    assert ranks == [{3}, {3}] and [row.errors for row in beside] == errors
