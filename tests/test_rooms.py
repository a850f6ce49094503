"""The package is rooms in an order: a file imports from its own room or from those before it, and never in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

import nai_t5_core

PACKAGE = Path(nai_t5_core.__file__).parent

ROOMS = [
    "facts",
    "tokenizer",
    "model",
    "backends",
    "generation",
    "float16",
    "weights",
    "lora",
    "prompts",
    "diffusers",
    "datasets",
    "training",
    "bench",
    "cli",
]
# Documented import paths, a line each, and what packaging asks for.
BESIDE_THEM = {"__init__.py", "py.typed", "hf.py", "diffusers_adapter.py", "diffusers_prompts.py"}
NO_TORCH = ("facts", "tokenizer", "cli")

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The module of a file: ``model.encoder``; the package itself is the empty name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            module = (node.module or "").partition(".")[2]
            inside = {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {name if name in MODULES else module for name in inside}
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith(f"{PACKAGE.name}.")}
    return found


def test_what_is_at_the_top_is_a_room_or_a_documented_path() -> None:
    there = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert there == {*ROOMS, *BESIDE_THEM}
    # As many as there are today: what else comes at the top has to be worth a room or a documented path of its own, as
    # caption sets were, which read prompts and are read by no other room but the command.
    assert len(there) <= 19


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_those_before_it(room: str) -> None:
    allowed = {"", *ROOMS[: ROOMS.index(room) + 1]}
    files = [path for name, path in MODULES.items() if name.split(".")[0] == room]
    assert files
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {imported}"
        for path in files
        for imported in imports_of(path)
        if imported.split(".")[0] not in allowed
    ]
    assert wrong == []


def test_no_imports_in_a_circle() -> None:
    graph = {name: imports_of(path) - {name} for name, path in MODULES.items() if name}
    assert sum(map(len, graph.values())) > 300, "imports are not found any more"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_files_are_small() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > 400} == {}
    assert median(count for count in lines.values() if count) <= 130


def test_the_model_holds_mathematics_only() -> None:
    forbidden = {"os", "pathlib", "json", "logging", "subprocess", "safetensors", "huggingface_hub", "warnings"}
    for path in (PACKAGE / "model").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & forbidden, path.name


def test_facts_and_the_command_need_no_torch() -> None:
    modules = [f"nai_t5_core.{name}" for name in MODULES if name.split(".")[0] in NO_TORCH and "__main__" not in name]
    code = f"import sys, nai_t5_core, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_what_type_checkers_see() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == {name: f"nai_t5_core.{home}" for name, home in nai_t5_core._HOME.items()}
    assert all(getattr(nai_t5_core, name).__name__ == name for name in nai_t5_core.__all__)
