"""The records of families: their shape, facts pinned by hand, look-up and text cleaning."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from nai_t5_core.facts import families, text_cleaning
from nai_t5_core.facts.families import FAMILIES, Family, family, family_names
from nai_t5_core.facts.families.record import CallTakes, ComfyAlone, MaskDtype, Runs, TokenizerLimit
from nai_t5_core.facts.padding import PADDING_POLICIES, PadTo
from nai_t5_core.facts.text_cleaning import TextCleaning, clean_text

ROWS = [family(name) for name in family_names()]

# name: (max_length, length_limit, encoder_mask, padding, mask_dtype, text_cleaning)
PINNED = {
    "flux": (512, 512, False, "attend", None, "none"),
    "sd3": (256, 512, False, "attend", None, "none"),
    "hidream": (128, None, True, "exact", None, "none"),
    "chroma": (512, 512, True, "exact", "float", "none"),
    "latte": (120, None, True, "exact", None, "lower-strip"),
    "pixart-alpha": (120, None, True, "skip", "int64", "lower-strip"),
    "pixart-sigma": (300, None, True, "skip", "int64", "lower-strip"),
    "deepfloyd-if": (77, None, True, "exact", None, "lower-strip"),
    "cogvideox": (226, None, False, "attend", None, "none"),
    "cogview3plus": (224, None, False, "attend", None, "none"),
    "ltx-video": (128, None, False, "attend", "bool", "none"),
    "ltx-condition": (256, None, True, "skip", "bool", "none"),
    "mochi": (256, None, True, "skip", "bool", "none"),
    "cosmos": (512, None, True, "skip", None, "none"),
    "wan": (226, None, True, "skip", None, "wan"),
    "hunyuandit": (256, None, True, "exact", "int64", "none"),
    "hunyuanimage": (128, None, True, "skip", "int64", "quoted"),
    "glm-image": (2048, None, True, "trim", None, "none"),
}


@pytest.mark.parametrize("name", PINNED)
def test_pinned_facts(name: str) -> None:
    row = family(name)
    facts = (row.max_length, row.length_limit, row.encoder_mask, row.padding, row.mask_dtype, row.text_cleaning)
    assert facts == PINNED[name]


def test_more_pinned_facts() -> None:
    assert [row.name for row in ROWS if row.extra_pad] == ["chroma"]
    assert {row.name: row.call_length for row in ROWS if row.call_length} == {"helios": 512, "wan": 512}
    assert [row.name for row in ROWS if row.pad_to == "longest"] == ["ace-step", "audioldm2", "longcat-audiodit"]
    assert [row.name for row in ROWS if not row.pipelines] == ["ace-step"]
    assert family("cosmos").checkpoint == "google-t5/t5-11b"
    assert family("auraflow").checkpoint == "EleutherAI/pile-t5-xl"
    assert family("wan").checkpoint == "google/umt5-xxl"
    assert family("mochi").returns_mask and not family("wan").returns_mask


def test_every_record_is_there_once() -> None:
    files = Path(families.__file__).parent.glob("*.py")
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert len(ROWS) == len(FAMILIES) == sum(ast.unparse(call.func) == "Family" for call in calls) >= 29
    assert len(family("wan").pipelines) == 14
    names = [families._key(name) for row in ROWS for name in (row.name, *row.aliases, *row.pipelines)]
    assert len(names) == len(set(names))
    assert all(families._key(name) == name for row in ROWS for name in (row.name, *row.aliases))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_values_are_legal(row: Family) -> None:
    assert row.title and row.reason and row.checkpoint.count("/") == 1
    assert all(name.endswith("Pipeline") for name in row.pipelines)
    assert 0 < row.max_length <= (row.length_limit or 2048)
    assert row.pad_to in get_args(PadTo)
    assert row.padding in PADDING_POLICIES
    assert row.mask_dtype in (None, *get_args(MaskDtype))
    assert row.text_cleaning in get_args(TextCleaning)
    # Without a mask the pads are tokens like any others. Bria gives no mask because it gives no pads.
    assert (row.padding == "attend") == (not row.encoder_mask) or row.name == "bria"
    assert (row.padding == "trim") == (row.pad_to == "none")


@pytest.mark.parametrize("row", [row for row in ROWS if row.diffusers], ids=lambda row: row.name)
def test_what_is_said_of_pipelines_is_legal(row: Family) -> None:
    facts = row.diffusers
    assert facts is not None and facts.pipelines
    assert len(set(facts.outputs)) == len(facts.outputs) > 0
    assert set(facts.of_others) <= set(facts.outputs)
    # A pooled row is CLIP's.
    assert {name for name in facts.outputs if "pooled" in name} <= set(facts.of_others)
    assert facts.runs in get_args(Runs)
    assert facts.tokenizer_limit in get_args(TokenizerLimit)
    assert facts.call_takes in get_args(CallTakes)
    # A call that takes no embeddings takes no longer ones.
    assert facts.call_takes != "nothing" or facts.one_chunk


def test_every_word_for_pipelines_is_used() -> None:
    """A word that no family needs is code that nothing runs."""
    facts = [row.diffusers for row in ROWS if row.diffusers]
    assert {each.runs for each in facts} == set(get_args(Runs))
    assert {each.tokenizer_limit for each in facts} == set(get_args(TokenizerLimit))
    assert {each.call_takes for each in facts} == set(get_args(CallTakes))


def test_families_that_share_a_name_in_comfyui_share_all_of_it() -> None:
    first: dict[str, Family] = {}
    for row in FAMILIES:
        if isinstance(row.comfy, ComfyAlone):
            other = first.setdefault(row.comfy.name, row)
            assert (row.comfy, row.checkpoint) == (other.comfy, other.checkpoint)
    assert len(first) >= 10


def test_rows_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        family("flux").max_length = 256  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flux", "flux"),
        ("flux-dev", "flux"),
        ("FLUX_dev", "flux"),
        (" Flux Schnell ", "flux"),
        ("sd3.5", "sd3"),
        ("skyreels-v2", "wan"),
        ("consisid", "cogvideox"),
        ("cosmos2", "cosmos"),
        ("ltx", "ltx-video"),
        ("PixArtSigmaPAGPipeline", "pixart-sigma"),
        ("WanVACEPipeline", "wan"),
    ],
)
def test_look_up(name: str, expected: str) -> None:
    assert family(name) is family(expected)
    assert family(name).name == expected


def test_names_are_sorted_and_without_aliases() -> None:
    names = family_names()
    assert names == sorted(names)
    assert "flux" in names and "flux-dev" not in names


def test_unknown_family_is_told_with_the_closest() -> None:
    with pytest.raises(ValueError, match=r"Unknown family 'pixart-sgima'; known: ace-step, .*'pixart-sigma'\?"):
        family("pixart-sgima")
    with pytest.raises(ValueError, match=r"Unknown family 'zzzzzz'; known: .*wan\.$"):
        family("zzzzzz")


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("none", "  A Cat&amp; ", "  A Cat&amp; "),
        ("lower-strip", " \tA Red  CAT \n", "a red  cat"),
        ("lower-strip", "ÉTÉ", "été"),
        ("lower-strip", "", ""),
        ("wan", "  salt &amp;amp; pepper ", "salt & pepper"),
        ("wan", "two\n\n lines\tand   a tab", "two lines and a tab"),
        ("wan", "A&nbsp;Cat", "A Cat"),
        ("wan", "&amp;amp;lt;", "&lt;"),
        ("quoted", "a sign says \"HELLO\" and 'bye'", 'Text "bye". Text "HELLO". '),
        ("quoted", '“eins” ‘zwei’ "x" "x"', 'Text "x". Text "x". Text "zwei". Text "eins". '),
        ("quoted", "no text here", ""),
        ("double-quoted", '“one” and "two" and "one" but not \'three\'', 'Text "one". Text "two". '),
        ("double-quoted", "it's a dog's life", ""),
    ],
)
def test_clean_text(kind: TextCleaning, text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)  # as if it were not installed
    assert clean_text(text, kind) == expected


def test_wan_mends_text_with_ftfy_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", SimpleNamespace(fix_text=lambda text: text.replace("Ã©", "&eacute;")))
    assert clean_text(" cafÃ©  noir", "wan") == "café noir"


def test_unknown_cleaning_is_told() -> None:
    with pytest.raises(ValueError, match="Unknown text cleaning 'upper'; known: none, lower-strip"):
        clean_text("a", "upper")  # type: ignore[arg-type]


def test_every_cleaning_has_a_function() -> None:
    assert set(text_cleaning._CLEANERS) == set(get_args(TextCleaning))


def test_import_needs_no_torch() -> None:
    code = "import sys, nai_t5_core.facts.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
