"""The plan of a caption set: what is read, what is one prompt, and what is refused before anything changes."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq
from toy_captions import captions, digests, made, order, planned, write_captions, write_rows

from nai_t5_core.datasets import ledger, recipe
from nai_t5_core.datasets.arrow import MissingPackageError
from nai_t5_core.datasets.captions import Columns, read_captions
from nai_t5_core.datasets.check import collect_garbage
from nai_t5_core.datasets.folder import SetFolder
from nai_t5_core.datasets.ledger import Sample
from nai_t5_core.datasets.plan import Plan, existing_plan
from nai_t5_core.datasets.prompt_files import read_prompts
from nai_t5_core.datasets.reading import EmbeddingDataset
from nai_t5_core.datasets.recipe import Feeding, Keeping
from nai_t5_core.datasets.samples import known_samples
from nai_t5_core.prompts.cache.settings import settings_of
from nai_t5_core.weights.examine import find_tokenizer_for

TEXTS = captions(60)


def samples_of(folder: SetFolder) -> Iterator[list[Sample]]:
    return known_samples(folder.samples(existing_plan(folder).edition))


def files_of(folder: Path) -> dict[str, str]:
    return {str(path): path.read_bytes().hex() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_parquet(file: Path) -> Path:
    pq.write_table(pa.table({"id": list(TEXTS), "caption": list(TEXTS.values())}), file)
    return file


def write_csv(file: Path) -> Path:
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerows([("caption", "id"), *((text, name) for name, text in TEXTS.items())])
    return file


WRITERS: dict[str, Callable[[Path], Path]] = {
    "parquet": write_parquet,
    "jsonl": lambda file: write_captions(file, TEXTS),
    "csv": write_csv,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_samples(kind: str, tmp_path: Path) -> None:
    planner, plan = planned(order(), tmp_path / "set", WRITERS[kind](tmp_path / f"captions.{kind}"))
    samples = [sample for batch in samples_of(planner.folder) for sample in batch]
    assert {name: text for name, _, text in samples} == TEXTS
    assert plan.samples == len(TEXTS)
    assert plan.prompts == len(set(TEXTS.values())) < len(TEXTS)


def test_lines_of_a_text_file_have_their_numbers_as_ids(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\ntwo\u2028lines\n\nfour".encode())
    planner, _ = planned(order(id_column=None), tmp_path / "set", tmp_path / "a.txt")
    samples = {name: text for batch in samples_of(planner.folder) for name, _, text in batch}
    assert samples == {"0": "one", "1": "two\u2028lines", "2": "", "3": "four"}


def test_a_prompts_key_is_that_of_the_cache(tmp_path: Path) -> None:
    planner, _ = planned(order("flux"), tmp_path / "set", write_captions(tmp_path / "a.jsonl", {"x": "a red fox"}))
    ((_, key, _),) = next(iter(samples_of(planner.folder)))
    ids = find_tokenizer_for(None)(["a red fox"], 512, pad_to=512).input_ids[0]
    assert key.hex() == settings_of(device="cpu").key(ids).digest


def test_shards_are_sorted_by_length_and_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    backwards = dict(reversed(TEXTS.items()))
    planner, plan = planned(order(), tmp_path / "one", write_captions(tmp_path / "a.jsonl", TEXTS))
    other, again = planned(order(), tmp_path / "two", write_captions(tmp_path / "b.jsonl", backwards))
    assert plan.shards == again.shards and len(plan.shards) > 2
    lengths = []
    for number, shard in enumerate(plan.shards):
        one, two = read_prompts(planner.folder, number), read_prompts(other.folder, number)
        assert one.keys.equal(two.keys) and one.ids.equal(two.ids)
        assert shard.rows * plan.recipe.row_bytes <= plan.recipe.keeping.shard_bytes
        lengths += one.tokens.tolist()
    assert lengths == sorted(lengths)


def test_more_rows_add_shards_and_leave_those_that_are_there(tmp_path: Path) -> None:
    first = write_captions(tmp_path / "a.jsonl", TEXTS)
    folder = made(order(), tmp_path / "set", first)
    before = digests(folder.path)
    longer = write_captions(tmp_path / "a.jsonl", {**TEXTS, **captions(30, first=100)})
    made(order(), tmp_path / "set", longer)
    after = digests(folder.path)
    assert before.items() < after.items()
    plan = existing_plan(folder)
    assert plan.samples == len(TEXTS) + 30
    keys = [bytes(key) for number in range(len(plan.shards)) for key in read_prompts(folder, number).keys.numpy()]
    assert len(keys) == len(set(keys)) == plan.prompts


def test_a_file_that_is_planned_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_captions(tmp_path / "a.jsonl", TEXTS)
    _, plan = planned(order(), tmp_path / "set", file)
    monkeypatch.setattr("nai_t5_core.datasets.plan.read_captions", None)
    assert planned(order(), tmp_path / "set", file)[1] == plan


def test_what_a_killed_plan_has_left_is_no_obstacle(tmp_path: Path) -> None:
    """All but plan.json, which is what publishes a plan."""
    file = write_captions(tmp_path / "a.jsonl", TEXTS)
    planner, plan = planned(order(), tmp_path / "set", write_captions(tmp_path / "b.jsonl", captions(20, first=500)))
    (tmp_path / "set" / "planning.sqlite").write_bytes(b"half")
    planner.folder.plan.unlink()
    _, plan = planned(order(), tmp_path / "set", file)
    assert {name for batch in samples_of(planner.folder) for name, _, _ in batch} == set(TEXTS)
    assert plan.samples == len(TEXTS)


def test_samples_of_a_plan_that_was_not_published_are_none_of_the_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the two files, of which the last publishes the plan."""
    file = write_captions(tmp_path / "a.jsonl", TEXTS)
    folder = made(order(), tmp_path / "set", file)
    longer = write_captions(tmp_path / "b.jsonl", {**TEXTS, "new": "something else", "same": TEXTS["clip/0003"]})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Plan, "as_json", killed)
        planned(order(), tmp_path / "set", longer)
    assert set(EmbeddingDataset(folder.path).ids.to_pylist()) == set(TEXTS)
    mended = write_captions(tmp_path / "b.jsonl", {**TEXTS, "new": "what was meant"})
    _, plan = planned(order(), tmp_path / "set", mended)
    samples = {name: text for batch in samples_of(folder) for name, _, text in batch}
    assert samples == {**TEXTS, "new": "what was meant"}
    assert plan.samples == len(TEXTS) + 1
    collect_garbage(folder)
    assert [file.name for file in folder.path.glob("samples*")] == [folder.samples(plan.edition).name]


def killed(plan: Plan) -> str:
    raise KeyboardInterrupt


def test_no_more_samples_lie_about_than_those_that_someone_may_just_open(tmp_path: Path) -> None:
    for number in range(1, 5):
        file = write_captions(tmp_path / "a.jsonl", captions(20 * number))
        planner, plan = planned(order(), tmp_path / "set", file)
        assert planner.folder.samples(plan.edition) in planner.folder.all_samples()
        assert len(planner.folder.all_samples()) == min(number, 2)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------

ROWS = [{"id": name, "caption": text} for name, text in TEXTS.items()]
BAD_INPUT: dict[str, tuple[str | list[dict[str, Any]], str]] = {
    "no such column": ([{"id": "a", "text": "x"}], "has no column 'caption'; it has: id, text"),
    "a null": ([*ROWS, {"id": "z", "caption": None}], "1 of 61 rows .* row 60 of .* has no caption.*--skip-bad"),
    "a number": ([*ROWS, {"id": "z", "caption": 3}], "has the caption 3, which is no text"),
    "half a character in an id": ([*ROWS, {"id": "z\ud83e", "caption": "a"}], "row 60 of .* has half a pair"),
    "half a character": ([*ROWS, {"id": "z", "caption": "a \ud83e"}], "has half a pair of surrogates"),
    "no id": ([*ROWS, {"id": None, "caption": "x"}], "row 60 of .* has no id"),
    "an id of another type": ([*ROWS, {"id": 1.5, "caption": "x"}], "the id 1.5, which is neither"),
    "one id, two captions": (
        [*ROWS, {"id": "clip/0003", "caption": "something else"}],
        "the id 'clip/0003' is given to two captions: 'a red.*' and 'something else'; nothing was changed",
    ),
    "no JSON": ('{"id": "a", "caption": "x"}\nnothing\n', "line 2 is no JSON"),
    "a list": ("[1, 2]\n", "line 1 is a JSON list, and an object is needed"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.parametrize("is_new", [True, False])
def test_bad_input_is_one_sentence_and_changes_nothing(case: str, is_new: bool, tmp_path: Path) -> None:
    content, expected = BAD_INPUT[case]
    file = tmp_path / "bad.jsonl"
    if isinstance(content, str):
        file.write_text(content)
    else:
        write_rows(file, content)
    out = tmp_path / "set"
    if not is_new:
        planned(order(), out, write_captions(tmp_path / "a.jsonl", TEXTS))
    before = files_of(out)
    with pytest.raises(ValueError, match=expected):
        planned(order(), out, file)
    assert files_of(out) == before
    assert out.exists() == (not is_new)


def test_files_without_a_caption_make_no_set(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"a.jsonl: no captions; nothing was changed"):
        planned(order(), tmp_path / "set", tmp_path / "a.jsonl")
    assert not (tmp_path / "set").exists()


def test_a_full_disk_is_told_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger that may have no more pages than it has at first."""
    monkeypatch.setattr(ledger, "_PRAGMAS", ledger._PRAGMAS + "PRAGMA max_page_count=8;")
    file = write_captions(tmp_path / "a.jsonl", {str(number): f"caption {number}" for number in range(2000)})
    with pytest.raises(OSError, match=r"planning.sqlite cannot be written: .*full; nothing was changed"):
        planned(order(), tmp_path / "set", file)
    assert not (tmp_path / "set").exists()


def test_bad_rows_can_be_left_out(tmp_path: Path) -> None:
    bad = [
        {"id": "z", "caption": None},
        {"id": "y"},
        {"id": "x", "caption": "\ud83e"},
        {"id": "\ud83e", "caption": "x"},
    ]
    file = write_rows(tmp_path / "a.jsonl", [*ROWS, *bad])
    planner, plan = planned(replace(order(), skip_bad=True), tmp_path / "set", file)
    assert (plan.samples, planner.left_out) == (len(TEXTS), 4)


def test_rows_of_a_further_file_are_numbered_behind_those_of_the_earlier_ones(tmp_path: Path) -> None:
    numbered = order(id_column=None)
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("one\ntwo\n")
    second.write_text("three\n")
    planned(numbered, tmp_path / "set", first)
    with pytest.raises(ValueError, match=r"b.txt: the id '0' .* give the earlier files \(a.txt\) before new ones"):
        planned(numbered, tmp_path / "set", second)
    planner, _ = planned(numbered, tmp_path / "set", first, second)
    samples = {name: text for batch in samples_of(planner.folder) for name, _, text in batch}
    assert samples == {"0": "one", "1": "two", "2": "three"}


FILES: dict[str, tuple[str, bytes, str]] = {
    "another ending": ("a.json", b"{}", "files that end in .parquet, .jsonl, .csv, .txt"),
    "no text": ("a.txt", b"caf\xe9\n", "is no text in UTF-8"),
    "no parquet": ("a.parquet", b"PAR1 nothing", "cannot be read as parquet"),
    "an open quote": ("a.csv", b'caption,id\n"open,1\n', "is no CSV file"),
    "a comma without quotes": (
        "a.csv",
        b"caption,id\na fox,1\na fox, red,2\n",
        "line 3 has more fields than there are columns; a caption with a comma in it needs quotes",
    ),
    "an empty csv": ("a.csv", b"", "has no column 'caption'; it has: none"),
    "text has no ids": ("a.txt", b"x\n", "has no column 'id'; leave --id out"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_not_what_it_is_called_is_refused(case: str, tmp_path: Path) -> None:
    name, content, expected = FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        list(read_captions(tmp_path / name, Columns("caption", None if case == "no text" else "id")))


@pytest.mark.parametrize("without", [slice(0, 4096), slice(4096, 8192), slice(8192, None)])
def test_lines_that_leave_a_column_out_are_rows_without_it(without: slice, tmp_path: Path) -> None:
    """Also so many in a row that they are read at a time."""
    rows: list[dict[str, Any]] = [{"id": number, "caption": "x"} for number in range(9000)]
    for row in rows[without]:
        del row["caption"]
    file = write_rows(tmp_path / "a.jsonl", rows)
    read = [caption for batch in read_captions(file, Columns("caption", "id")) for caption in batch.captions]
    assert read == [row.get("caption") for row in rows]


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_another_cleaning_of_the_text_is_another_setting(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with ftfy, which Wan's cleaning uses, goes on with the set of one without."""
    file = write_captions(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setattr(recipe, "find_spec", lambda name: None)
    planned(order(family), tmp_path / "set", file)
    monkeypatch.setattr(recipe, "find_spec", lambda name: name)
    longer = write_captions(tmp_path / "a.jsonl", {**TEXTS, "new": "something else"})
    if family == "flux":
        assert planned(order(family), tmp_path / "set", longer)[1].samples == len(TEXTS) + 1
    else:
        with pytest.raises(ValueError, match=r"feeding.ftfy is False there and True now"):
            planned(order(family), tmp_path / "set", longer)


CHANGES = {
    "family": (order("helios"), "feeding.family is 'wan' there and 'helios' now"),
    "length": (replace(order(), feeding=Feeding.choose("wan", 226)), "feeding.max_length is 512 there and 226 now"),
    "store": (order(store="int8"), "keeping.store is 'bfloat16' there and 'int8' now"),
    "dtype": (
        order(encoder=replace(order().encoder, dtype="float32")),
        r"encoder.dtype is 'bfloat16' there and 'float32' now",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_other_settings_are_refused_with_what_differs(case: str, tmp_path: Path) -> None:
    base = order(encoder=replace(order().encoder, dtype="bfloat16"))
    file = write_captions(tmp_path / "a.jsonl", TEXTS)
    planned(base, tmp_path / "set", file)
    before = files_of(tmp_path / "set")
    with pytest.raises(ValueError, match=CHANGES[case][1]):
        planned(CHANGES[case][0], tmp_path / "set", file)
    assert files_of(tmp_path / "set") == before


IDS: dict[str, tuple[list[Any], str | None, str | None, str]] = {
    "names, then numbers of rows": (
        ["clip/0", "clip/1"],
        "id",
        None,
        r"has ids of a column, such as that of 'a.jsonl', .* Give --id COLUMN",
    ),
    "numbers of a column, then of rows": ([1000, 1001], "id", None, r"has ids of a column, .* Give --id COLUMN"),
    "numbers of rows, then of a column": (
        [1000, 1001],
        None,
        "id",
        r"has the numbers of the rows as ids, such as those of 'a.jsonl', and --id id .* Leave --id out",
    ),
    "numbers of rows, then names": (["clip/0", "clip/1"], None, "id", r"has the numbers of the rows as ids"),
}


@pytest.mark.parametrize("case", IDS)
def test_ids_of_a_column_and_numbers_of_rows_are_not_in_one_set(case: str, tmp_path: Path) -> None:
    """Every caption would be there a second time."""
    names, first, second, expected = IDS[case]
    rows = [{"id": name, "caption": f"caption {name}"} for name in names]
    file, more = write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", rows[:1])
    planned(order(id_column=first), tmp_path / "set", file)
    before = files_of(tmp_path / "set")
    for files in ([file], [more], [file, more]):
        with pytest.raises(ValueError, match=expected):
            planned(order(id_column=second), tmp_path / "set", *files)
        assert files_of(tmp_path / "set") == before
    # As they were given, it goes on; without ids, those of the earlier files come first.
    assert planned(order(id_column=first), tmp_path / "set", file, more)[1].samples == (2 if first else 3)


def test_a_plan_that_does_not_note_how_ids_were_given_is_told_by_its_ids(tmp_path: Path) -> None:
    """One of an earlier version: ids of digits may be of either kind, and are taken for what is given now."""
    for case, (ids, refused) in {"names": (["clip/0"], True), "digits": ([1000], False)}.items():
        out = tmp_path / case
        file = write_rows(tmp_path / f"{case}.jsonl", [{"id": name, "caption": "x"} for name in ids])
        planned(order(), out, file)
        values = json.loads((out / "plan.json").read_text())
        del values["inputs"][0]["numbered"]
        (out / "plan.json").write_text(json.dumps(values))
        assert planned(order(), out, file)[1].samples == 1
        if refused:
            with pytest.raises(ValueError, match=r"has ids of a column, such as 'clip/0', .* Give --id COLUMN"):
                planned(order(id_column=None), out, file)
        else:
            plan = planned(order(id_column=None), out, file)[1]
            assert [given.numbered for given in plan.inputs] == [None, True]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    file = write_captions(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(ValueError, match=r"a\.jsonl is a file; a set needs a folder"):
        planned(order(), file, file)
    assert file.read_text().count("\n") == len(TEXTS)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds 'holiday.jpg' and no plan.json: it is no caption set"):
        planned(order(), tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "recipe": {}}'])
def test_a_damaged_plan_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=r"plan.json is no plan of a caption set"):
        existing_plan(SetFolder(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "give a family such as wan, or max_length"),
        ({"family": "wam"}, "Did you mean 'wan'"),
        ({"max_length": 0}, "max_length=0; it must be 1 or more"),
        ({"family": "wan", "padding": "none"}, "unknown padding policy 'none'"),
    ],
)
def test_how_captions_are_fed_is_checked(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Feeding.choose(**arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"store": "int4"}, "store='int4'; allowed: bfloat16, int8, float8"),
        ({"compress": "gzip"}, "compress='gzip'; allowed: none, zlib, zstd"),
        ({"shard_bytes": 0}, "shard_bytes=0; it must be 1 or more"),
    ],
)
def test_how_results_are_kept_is_checked(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Keeping(**arguments)


def test_without_pyarrow_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingPackageError, match=r'pip install "comfy-nai-t5\[datasets\]"'):
        planned(order(), tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS))
