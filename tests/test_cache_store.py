"""The store of embeddings: what is put is what comes back, or nothing does; and it costs nothing else."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from conftest import TOY_CONFIGS
from safetensors.torch import load_file, save
from torch import Tensor

from nai_t5_core.prompts.cache import disk as disk_module
from nai_t5_core.prompts.cache.disk import DiskStore
from nai_t5_core.prompts.cache.entry import FORMS, DamagedEntryError, Entry, Form, from_bytes, to_bytes
from nai_t5_core.prompts.cache.key import Key, Settings
from nai_t5_core.prompts.cache.memory import Embedding, MemoryStore
from nai_t5_core.prompts.cache.store import Store, default_folder, open_store
from nai_t5_core.weights import whole_files

SETTINGS = Settings("0" * 64, TOY_CONFIGS["v1.1"], "bfloat16", "cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def key_of(number: int) -> Key:
    return SETTINGS.key([number, 1])


def put(store: DiskStore, number: int, rows: Tensor) -> bool:
    return store.put(key_of(number), Embedding(rows))


def found_in(store: DiskStore, number: int, least_rows: int = 1) -> Tensor | None:
    found = store.get(key_of(number), least_rows)
    return None if found is None else found.rows


def rows_of(number: int, dtype: torch.dtype = torch.bfloat16, rows: int = 5, width: int = 64) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(number)).to(dtype)


def on_disk(folder: Path, limit: int = 10_000_000, form: Form = "computed") -> DiskStore:
    return DiskStore(folder / "cache", limit, form)


# ---------------------------------------------------------------------------------------------------------------------
# One entry
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_come_back_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = rows_of(1, dtype)
    assert put(on_disk(tmp_path), 1, rows)
    found = found_in(on_disk(tmp_path), 1)
    assert found is not None and found.dtype == dtype and torch.equal(found, rows)


@pytest.mark.parametrize(("form", "error"), [("bfloat16", 4e-3), ("float16", 5e-4), ("int8", 7e-3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smaller_forms_are_smaller_and_near(form: Form, error: float, dtype: torch.dtype) -> None:
    rows = rows_of(2, dtype, rows=77) * torch.logspace(-2, 2, 64).to(dtype)  # channels of all sizes
    content = to_bytes(key_of(2), rows, form)
    entry = from_bytes(content)
    assert entry.rows.dtype == dtype
    is_smaller = form == "int8" or dtype.itemsize > 2
    assert entry.form == (form if is_smaller else "computed")
    assert (len(content) < len(to_bytes(key_of(2), rows))) == is_smaller
    distance = (entry.rows.double() - rows.double()).norm() / rows.double().norm()
    assert distance <= error if is_smaller else torch.equal(entry.rows, rows)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_that_were_only_widened_take_half_the_room(half: torch.dtype) -> None:
    rows = rows_of(3, half, rows=50).float()
    content = to_bytes(key_of(3), rows)
    entry = from_bytes(content)
    assert entry.form == "computed" and entry.rows.dtype == torch.float32 and torch.equal(entry.rows, rows)
    assert len(content) < 0.65 * len(to_bytes(key_of(3), rows_of(3, torch.float32, rows=50)))


def test_a_number_is_not_lost_to_a_smaller_form() -> None:
    rows = rows_of(3, torch.float32) * 1e6
    entry = from_bytes(to_bytes(key_of(3), rows, "float16"))
    assert entry.form == "computed" and torch.equal(entry.rows, rows)


def test_rows_of_zeros_can_be_in_8_bits() -> None:
    assert not from_bytes(to_bytes(key_of(1), torch.zeros(3, 64), "int8")).rows.any()


def test_what_is_kept_smaller_is_given_only_to_who_asked_for_it(tmp_path: Path) -> None:
    rows = rows_of(1, torch.float32)
    for form in FORMS:
        put(on_disk(tmp_path / form, form=form), 1, rows)
        given = {other for other in FORMS if found_in(on_disk(tmp_path / form, form=other), 1) is not None}
        assert given == (set(FORMS) if form == "computed" else {form})


def test_an_entry_is_a_safetensors_file_that_tells_its_key(tmp_path: Path) -> None:
    disk, key = on_disk(tmp_path), key_of(1)
    put(disk, 1, rows_of(1))
    path = tmp_path / "cache" / key.digest[:2] / f"{key.digest}.safetensors"
    assert torch.equal(load_file(path)["rows"], rows_of(1))
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert header["key"] == key.text and json.loads(header["key"])["ids"] == [1, 1]


def test_too_few_rows_are_none_and_more_replace_them(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(key_of(1), rows_of(1)[:3])
    assert store.get(key_of(1), least_rows=4) is None
    store.put(key_of(1), rows_of(1))
    store.wait()
    for again in (store, Store(tmp_path)):
        found = again.get(key_of(1), least_rows=4)
        assert found is not None and torch.equal(found, rows_of(1))


# ---------------------------------------------------------------------------------------------------------------------
# In memory
# ---------------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_go_out_of_memory() -> None:
    memory = MemoryStore(3 * rows_of(0).nbytes)
    for number in range(3):
        memory.put(str(number), Embedding(rows_of(number)))
    assert memory.get("0") is not None
    memory.put("3", Embedding(rows_of(3)))
    assert [name for name in "0123" if memory.get(name) is not None] == ["0", "2", "3"]
    assert memory.nbytes == memory.limit
    memory.put("3", Embedding(rows_of(4, rows=2)))
    assert memory.nbytes == 2 * rows_of(0).nbytes + rows_of(4, rows=2).nbytes
    memory.put("5", Embedding(rows_of(5, rows=100)))
    assert memory.get("5") is None and len(memory) == 3


def test_nobody_can_change_what_is_kept() -> None:
    store, rows = Store(None), rows_of(1)
    store.put(key_of(1), rows)
    rows.zero_()
    for _ in range(2):
        found = store.get(key_of(1))
        assert found is not None and torch.equal(found, rows_of(1))
        found.zero_()


def test_what_goes_with_the_rows_comes_with_them(tmp_path: Path) -> None:
    extras = {"mask": torch.tensor([[1, 1, 0]]), "pooled": torch.randn(1, 7), "flag": torch.tensor(True)}
    store = Store(tmp_path)
    store.put(key_of(1), rows_of(1), extras)
    store.wait()
    for again in (store, Store(tmp_path), Store(tmp_path, form="int8")):
        found = again.find(key_of(1))
        assert found is not None and torch.equal(found.rows, rows_of(1)) and found.extras.keys() == extras.keys()
        assert all(torch.equal(found.extras[name], tensor) for name, tensor in extras.items())
        for tensor in found.extras.values():
            tensor.zero_()


def test_a_store_counts_what_it_is_asked_for(tmp_path: Path) -> None:
    put(on_disk(tmp_path), 1, rows_of(1))
    store = Store(tmp_path / "cache")
    for number in (1, 2, 1, 1):
        store.get(key_of(number))
    assert (store.counts.from_disk, store.counts.from_memory, store.counts.misses) == (1, 2, 1)
    assert store.counts.hits == 3


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))])
def test_a_copy_has_the_same_folder(twin: Callable[[Store], Store], tmp_path: Path) -> None:
    store = Store(tmp_path, disk=12345, form="int8")
    store.put(key_of(1), rows_of(1))
    store.wait()
    again = twin(store)
    assert again.disk is not None and (again.disk.limit, again.disk.form) == (12345, "int8")
    assert again.get(key_of(1)) is not None


# ---------------------------------------------------------------------------------------------------------------------
# The limit of the folder
# ---------------------------------------------------------------------------------------------------------------------


def test_the_least_recently_read_go_from_the_folder(tmp_path: Path) -> None:
    size = len(to_bytes(key_of(0), rows_of(0)))
    disk = on_disk(tmp_path, limit=10 * size + size // 2)
    for number in range(10):
        put(disk, number, rows_of(number))
        os.utime(disk.place(key_of(number)), (1e9 + number, 1e9 + number))
    assert found_in(disk, 0) is not None  # now the last
    put(disk, 10, rows_of(10))
    assert [number for number in range(11) if found_in(disk, number) is None] == [1, 2]
    assert sum(kept.nbytes for kept in disk.kept()) <= disk.limit


def test_the_limit_counts_what_others_have_written(tmp_path: Path) -> None:
    size = len(to_bytes(key_of(0), rows_of(0)))
    one, two = on_disk(tmp_path, 10 * size), on_disk(tmp_path, 10 * size)
    for number in range(0, 30, 2):
        put(one, number, rows_of(number))
        put(two, number + 1, rows_of(number + 1))
    # Each knows what it has written itself, and looks again when that comes to the limit.
    assert len(one.kept()) <= 20
    put(on_disk(tmp_path, 10 * size), 99, rows_of(99))
    assert len(one.kept()) <= 10


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    disk = on_disk(tmp_path, limit=5000)
    put(disk, 1, rows_of(1))
    assert not put(disk, 2, rows_of(2, rows=500))
    assert [kept.path for kept in disk.kept()] == [disk.place(key_of(1))]


def test_an_entry_that_goes_while_it_is_read_stays_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = on_disk(tmp_path), on_disk(tmp_path)
    put(one, 1, rows_of(1))

    def others_clear(content: bytes) -> Entry:
        two.clear()
        return from_bytes(content)

    monkeypatch.setattr(disk_module, "from_bytes", others_clear)
    (one.place(key_of(1)).parent / "notes.txt").write_text("keeps the folder")
    found = found_in(one, 1)
    assert found is not None and torch.equal(found, rows_of(1))
    assert one.kept() == [] and not one.place(key_of(1)).exists()


def test_what_is_not_its_own_stays(tmp_path: Path) -> None:
    disk = on_disk(tmp_path)
    put(disk, 1, rows_of(1))
    others = [disk.folder / "photo.png", disk.place(key_of(1)).with_name("notes.txt"), disk.folder / "aa" / "x"]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_text("mine")
    assert len(disk.clear()) == 1
    assert disk.kept() == [] and all(other.read_text() == "mine" for other in others)


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def _flipped(content: bytes, place: int) -> bytes:
    damaged = bytearray(content)
    damaged[place] ^= 1
    return bytes(damaged)


def _with_metadata(content: bytes, **values: str) -> bytes:
    entry = from_bytes(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    return save({"rows": entry.rows}, {**header, **values})


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "cut off"),
    "a few bytes": (lambda content: content[:5], "cut off"),
    "half the header": (lambda content: content[:200], "cut off"),
    "half the rows": (lambda content: content[:-100], "damaged"),
    "more behind": (lambda content: content + b"x", "damaged"),
    "zeros": (lambda content: bytes(len(content)), "header is damaged"),
    "a bit of the rows": (lambda content: _flipped(content, -1), "not those that were written"),
    "a bit of the length": (lambda content: _flipped(content, 6), "cut off"),
    "a text": (lambda content: b"a text " * 100, "cut off"),
    "other weights": (lambda content: save({"rows": torch.zeros(3, 64)}), "no embedding of this program"),
    "another program's": (lambda content: _with_metadata(content, format="x"), "no embedding of this program"),
    "another schema": (lambda content: _with_metadata(content, schema="2"), "schema '2', and this program reads 1"),
    "another key": (lambda content: _with_metadata(content, key="{}"), "of another embedding"),
    "another dtype": (lambda content: _with_metadata(content, dtype="float16"), "holds torch.bfloat16"),
    "no dtype": (lambda content: _with_metadata(content, dtype="int4"), "header is damaged"),
    "no form": (lambda content: _with_metadata(content, form="zip"), "header is damaged"),
    "8 bits without scales": (lambda content: _with_metadata(content, form="int8"), "header is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_a_miss_is_told_once_and_is_replaced(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = on_disk(tmp_path)
    put(disk, 1, rows_of(1))
    path = disk.place(key_of(1))
    change, reason = DAMAGES[damage]
    path.write_bytes(change(path.read_bytes()))
    assert found_in(disk, 1) is None and found_in(disk, 1) is None
    assert len(caplog.messages) == 1
    assert reason in caplog.messages[0] and str(path) in caplog.messages[0] and "\n" not in caplog.messages[0]
    assert list(disk.faults()) == [path]
    assert put(disk, 1, rows_of(1)) and disk.faults() == {}
    found = found_in(disk, 1)
    assert found is not None and torch.equal(found, rows_of(1))


def test_an_entry_under_another_name_is_not_taken(tmp_path: Path) -> None:
    disk = on_disk(tmp_path)
    put(disk, 1, rows_of(1))
    other = disk.place(key_of(2))
    other.parent.mkdir(exist_ok=True)
    disk.place(key_of(1)).rename(other)
    assert found_in(disk, 2) is None
    assert disk.faults() == {other: "it is of another embedding"}


@pytest.mark.parametrize("byte", range(8, 400, 7))
def test_a_bit_of_the_header_is_seen(byte: int) -> None:
    content = to_bytes(key_of(1), rows_of(1))
    for bit in range(8):
        damaged = bytearray(content)
        damaged[byte] ^= 1 << bit
        try:
            entry = from_bytes(bytes(damaged))
        except DamagedEntryError:
            continue
        assert entry.key != key_of(1) or torch.equal(entry.rows, rows_of(1))


# ---------------------------------------------------------------------------------------------------------------------
# Folders that cannot be used
# ---------------------------------------------------------------------------------------------------------------------


def _is_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("in the way")


def _is_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fails(monkeypatch, "open", errno.EACCES)


def _has_a_file_inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / key_of(1).digest[:2]).write_text("in the way")


def _is_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fails(monkeypatch, "fsync", errno.ENOSPC)


def _fails(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    def failing(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(whole_files.os, call, failing)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_is_a_file, "a file is where it needs a folder"),
        (_has_a_file_inside, "a file is where it needs a folder"),
        (_is_read_only, "belongs to another user, or is read-only; give another folder"),
        (_is_full, "its disk is full; make room"),
    ],
)
def test_a_folder_that_cannot_be_used_costs_the_entry_and_nothing_else(
    spoil: Callable[[Path, pytest.MonkeyPatch], None],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "cache"
    with monkeypatch.context() as spoiled:
        spoil(folder, spoiled)
        store = Store(folder)
        for _ in range(3):
            store.memory.clear()
            assert store.get(key_of(1)) is None
            store.put(key_of(1), rows_of(1))
            store.wait()
        found = store.get(key_of(1))  # memory has it all the same
    assert found is not None and torch.equal(found, rows_of(1))
    assert len(caplog.messages) == 1 and told in caplog.messages[0] and str(folder) in caplog.messages[0]
    assert [path for path in tmp_path.rglob("*") if path.name.endswith((".part", ".safetensors"))] == []


@pytest.mark.parametrize("cache", [False, None, 3, "", 1.5])
def test_what_is_no_store_is_refused(cache: object) -> None:
    with pytest.raises(ValueError, match="give True for the default folder, a folder, or a Store"):
        open_store(cache)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{"memory": -1}, {"disk": 1.5}, {"form": "int4"}, {"disk": True}])
def test_limits_that_are_none_are_refused(arguments: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"memory|disk|unknown form 'int4'; allowed: computed"):
        Store(tmp_path, **arguments)  # type: ignore[arg-type]


def test_a_store_is_taken_as_it_is_and_true_is_the_default_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert open_store(store) is store
    for cache, folder in ((True, default_folder()), (str(tmp_path), tmp_path), (tmp_path, tmp_path)):
        opened = open_store(cache)
        assert opened.disk is not None and opened.disk.folder == folder


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, and the end of one
# ---------------------------------------------------------------------------------------------------------------------


def _in_another_process(work: Callable[[int], None]) -> tuple[int, int]:
    """A forked process that does some work, and what it writes to; it never returns here."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        os.close(reading)
        work(writing)
    finally:
        os._exit(0)


def test_twenty_kills_tear_and_lose_nothing(tmp_path: Path) -> None:
    """What is told to be written is there, whole, and nothing is there that is not whole."""
    told: list[int] = []
    for kill in range(20):

        def write(pipe: int, first: int = 1000 * kill) -> None:
            disk = on_disk(tmp_path, limit=10**9)
            for number in range(first, first + 1000):
                if put(disk, number, rows_of(number, rows=77)):
                    os.write(pipe, b"%d\n" % number)

        child, pipe = _in_another_process(write)
        os.read(pipe, 1)  # it has begun
        time.sleep(random.Random(kill).uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(pipe) as lines:
            text = str(1000 * kill)[0] + lines.read()
        told += [int(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    disk = on_disk(tmp_path, limit=10**9)
    assert len(told) >= 20 and disk.faults() == {}
    for number in told:
        found = found_in(disk, number)
        assert found is not None and torch.equal(found, rows_of(number, rows=77))
    # What the last one was about to write goes when the next writes there.
    unfinished = list(disk.folder.rglob("*.part"))
    disk.clear()
    assert len(unfinished) <= 20 and list(disk.folder.rglob("*.part")) == []


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    """Both write, read and remove the same entries, of which only a few may stay; neither sees a torn one."""
    size = len(to_bytes(key_of(0), rows_of(0)))

    def use(pipe: int) -> None:
        disk, wrong = on_disk(tmp_path, limit=12 * size), 0
        chosen = random.Random(pipe)
        for _ in range(60):
            number = chosen.randrange(20)
            put(disk, number, rows_of(number))
            number = chosen.randrange(20)
            found = found_in(disk, number)
            wrong += found is not None and not torch.equal(found, rows_of(number))
        os.write(pipe, b"%d wrong, %d told" % (wrong, len(disk._told)))

    others = [_in_another_process(use) for _ in range(2)]
    results = []
    for child, pipe in others:
        os.waitpid(child, 0)
        with os.fdopen(pipe) as said:
            results.append(said.read())
    assert results == ["0 wrong, 0 told"] * 2
    assert on_disk(tmp_path).faults() == {}


def test_a_forked_process_writes_by_itself(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(key_of(0), rows_of(0))

    def write(pipe: int) -> None:
        for number in range(1, 100):
            store.put(key_of(number), rows_of(number))
        store.wait()
        os.write(pipe, b"written")

    child, pipe = _in_another_process(write)
    os.waitpid(child, 0)
    with os.fdopen(pipe) as said:
        assert said.read() == "written"
    store.wait()
    assert all(Store(tmp_path).get(key_of(number)) is not None for number in range(100))


@pytest.mark.parametrize("which", ["the store's", "the memory's", "the folder's"])
def test_a_process_that_is_forked_while_another_thread_is_at_work(which: str, tmp_path: Path) -> None:
    """The thread is not there to let go of what it holds."""
    store = Store(tmp_path)
    store.put(key_of(0), rows_of(0))
    store.wait()
    assert store.disk is not None
    lock = {"the store's": store._lock, "the memory's": store.memory._lock, "the folder's": store.disk._lock}[which]
    holds, is_forked = Event(), Event()

    def hold() -> None:
        with lock:
            holds.set()
            is_forked.wait()

    def use(pipe: int) -> None:
        signal.alarm(10)  # ends it where it hangs
        assert store.get(key_of(0)) is not None
        store.put(key_of(1), rows_of(1))
        store.wait()
        os.write(pipe, b"written")

    other = Thread(target=hold)
    other.start()
    holds.wait()
    child, pipe = _in_another_process(use)
    os.waitpid(child, 0)
    is_forked.set()
    other.join()
    with os.fdopen(pipe) as said:
        assert said.read() == "written"
    assert Store(tmp_path).get(key_of(1)) is not None


def test_a_process_that_ends_has_written_all(tmp_path: Path) -> None:
    """Without being asked to wait."""
    code = (
        "import sys, torch; from pathlib import Path; from nai_t5_core.prompts.cache.store import Store\n"
        "from nai_t5_core.prompts.cache.key import Key\n"
        "store = Store(sys.argv[1])\n"
        "for number in range(30): store.put(Key(str(number)), torch.full((3, 4), float(number)))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    store = Store(tmp_path)
    for number in range(30):
        found = store.get(Key(str(number)))
        assert found is not None and torch.equal(found, torch.full((3, 4), float(number)))
