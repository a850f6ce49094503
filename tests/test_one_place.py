"""What is said once: a family in its record, and the words for padding in one file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import comfy_nai_t5
import nai_t5_core
from nai_t5_core.facts.families import FAMILIES
from nai_t5_core.facts.padding import PADDING_POLICIES

PACKAGES = [Path(package.__file__).parent for package in (nai_t5_core, comfy_nai_t5)]
RECORDS = PACKAGES[0] / "facts" / "families"
TREES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for package in PACKAGES
    for path in sorted(package.rglob("*.py"))
    if RECORDS not in path.parents
}

# A file that has such a word, and means something else by it.
NO_FAMILY = {
    ("text_cleaning.py", "wan"),  # a way of cleaning, which several families share
    *(("files.py", name) for name in ("pixart", "ltx")),  # trainers, by whose names their formats are called
}


def families_named_in(tree: ast.Module) -> set[str]:
    """Names of families among the string literals, alone or in a list with blanks between."""
    names = {name for row in FAMILIES for name in (row.name, *row.aliases, *row.pipelines)}
    names |= {row.comfy.name for row in FAMILIES if row.comfy is not None}
    literals = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    lists = [words for words in map(str.split, literals) if names.issuperset(words)]
    return {word for words in lists for word in words}


def lists_of_words(tree: ast.Module) -> Iterator[list[str]]:
    """The string literals that stand side by side: in a tuple, list, set or dictionary, or as attributes of a class."""
    for node in ast.walk(tree):
        side_by_side: list[ast.expr | None] = []
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            side_by_side = list(node.elts)
        elif isinstance(node, ast.Dict):
            side_by_side = [*node.keys, *node.values]
        elif isinstance(node, ast.ClassDef):
            side_by_side = [line.value for line in node.body if isinstance(line, ast.Assign)]
        yield [each.value for each in side_by_side if isinstance(each, ast.Constant) and isinstance(each.value, str)]


@pytest.mark.parametrize("path", TREES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_only_its_record_names_a_family(path: Path) -> None:
    named = {(path.name, name) for name in families_named_in(TREES[path])}
    assert named <= NO_FAMILY


def test_every_exception_is_one() -> None:
    assert {(path.name, name) for path, tree in TREES.items() for name in families_named_in(tree)} == NO_FAMILY


def test_names_are_found_where_they_stand() -> None:
    records = [families_named_in(ast.parse(path.read_text(encoding="utf-8"))) for path in RECORDS.glob("*.py")]
    assert {row.name for row in FAMILIES} <= set().union(*records)
    assert families_named_in(ast.parse("_TABLE = 'flux sd3'\nif name == 'ltxv': pass")) == {"flux", "sd3", "ltxv"}
    assert families_named_in(ast.parse("'the encoder of flux'; 'flux bria or any'")) == set()


def test_the_words_for_padding_are_listed_once() -> None:
    where = [
        path.name
        for path, tree in TREES.items()
        if any(len(set(PADDING_POLICIES).intersection(words)) > 2 for words in lists_of_words(tree))
    ]
    assert where == ["padding.py"]
