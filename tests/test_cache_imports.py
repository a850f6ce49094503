"""A kept embedding is read by a process that imports little beside torch: what encodes comes with the first miss."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

# What loads, computes, merges and guards an encoder, and what is read for other files than the one at hand.
FOR_A_MISS = {
    *("nai_t5_core.weights.load", "nai_t5_core.prompts.loading", "nai_t5_core.prompts.stack_encoding"),
    *("nai_t5_core.backends.choose", "nai_t5_core.float16.guard", "nai_t5_core.backends.quantised.projections"),
}
FOR_OTHERS = {
    *("nai_t5_core.lora.files", "nai_t5_core.weights.gguf_files", "nai_t5_core.weights.pytorch_files"),
    *("nai_t5_core.facts.families", "nai_t5_core.generation", "nai_t5_core.training"),
    *("nai_t5_core.backends.cuda.encoder", "nai_t5_core.backends.cuda.refusals", "nai_t5_core.backends.cuda.kernels"),
    *("transformers", "diffusers", "gguf", "torch._inductor", "torch._dynamo"),
}
READ = "from nai_t5_core import TextEncoder; TextEncoder.from_pretrained(cache={folder!r}).encode(['a cat'])"
COMMAND = "import sys; from nai_t5_core.cli import app; sys.argv[1:] = {arguments!r}; app(standalone_mode=False)"


def imported_by(code: str) -> set[str]:
    """The modules that a new process has imported in the end."""
    told = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], check=True, capture_output=True, text=True
    )
    return set(told.stdout.splitlines()[-1].split())


@pytest.fixture(params=["library", "command"])
def code(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A program that encodes a prompt through a cache."""
    if request.param == "library":
        return READ.format(folder=str(tmp_path))
    return COMMAND.format(arguments=["encode", "a cat", "--cache-dir", str(tmp_path), "--json"])


def test_what_is_imported_for_a_hit(code: str) -> None:
    assert imported_by(code) >= FOR_A_MISS
    there = imported_by(code)
    assert "nai_t5_core.prompts.cache.disk" in there and "sentencepiece" in there
    assert not there & FOR_A_MISS
    # torch 2.5 imports parts of its compiler by itself.
    assert not (there - imported_by("import torch")) & FOR_OTHERS


def test_what_is_for_other_files_is_known() -> None:
    """The names above are those of modules."""
    own = {name for name in FOR_OTHERS if name.startswith("nai_t5_core")}
    assert all(importlib.util.find_spec(name) is not None for name in own)


def test_the_command_looks_for_no_garbage_while_it_imports(tmp_path: Path) -> None:
    """And does so again when it encodes; in a program that has imported torch it leaves the collector alone."""
    told = (
        "import gc; print(sum(each['collections'] for each in gc.get_stats()), gc.isenabled(), gc.get_freeze_count())"
    )
    command = COMMAND.format(arguments=["encode", "a cat", "--cache-dir", str(tmp_path), "--json"])
    found = []
    # Python 3.12 puts some of its own objects aside before any program begins.
    for code in (command, f"import torch; {command}", ""):
        ran = subprocess.run([sys.executable, "-c", f"{code}\n{told}"], check=True, capture_output=True, text=True)
        found.append(ran.stdout.splitlines()[-1].split())
    (few, *after), (many, *as_ever), (_, *at_first) = found
    assert int(few) < int(many) / 2
    assert (after[0], as_ever) == ("True", at_first) and int(after[1]) > 100_000
