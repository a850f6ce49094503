"""What a file of each kind takes from its load to the first embedding, and of memory: each in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nai_t5_core.backends.choices import ProductsChoice
from nai_t5_core.backends.quantised.pieces import is_read
from nai_t5_core.bench.children import START, run_child
from nai_t5_core.bench.kinds_files import FILE_KINDS, PLAIN, refuse_files, write_kind
from nai_t5_core.bench.speed.results import Spread
from nai_t5_core.bench.speed.tables import Table
from nai_t5_core.facts.config import T5Config
from nai_t5_core.weights.examine import examine

# A process may hold this many times its file.
MEMORY_FACTOR = 1.05
# Tokens of the prompts that are encoded where memory is looked at.
_PROMPTS = (32, 512)
_READ_AT_ONCE = 1 << 24
_CLEAR = "/proc/self/clear_refs"

_OWN = """
import nai_t5_core.prompts.text_encoder
from nai_t5_core.prompts.choices import Choices
from nai_t5_core.prompts.loading import finish, load_chosen

def load():
    how = Choices(arguments["dtype"], "cpu", products=arguments["products"])
    return finish(load_chosen(arguments["source"], "", how).stack, how)
"""

_TIMED = """
began = time.perf_counter()
model = load()
loaded = time.perf_counter()
with torch.no_grad():
    model(ids).float().sum().item()
done = time.perf_counter()
runner = model.encoder.block[0].runner
by = "torch" if runner is None else runner.name
print(json.dumps({"load": loaded - began, "first": done - loaded, "by": by}), flush=True)
"""

_WEIGHED = """
from pathlib import Path

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def forget_the_highest():
    Path(arguments["clear"]).write_text("5")

# What the first product sets up once is no part of the weights.
small = torch.ones(64, 64, dtype=getattr(torch, arguments["dtype"]))
torch.nn.functional.linear(small, small)
before, own_before = memory("VmRSS"), memory("RssAnon")
forget_the_highest()
model = load()
after_load, loading = memory("VmRSS"), memory("VmHWM")
encoding = []
with torch.no_grad():
    for count in arguments["prompts"]:
        forget_the_highest()
        for _ in range(2):  # the second call of a model that is not quantised puts its weights in panels
            encoded = model(ids[:, torch.arange(count) % ids.shape[1]])
        assert bool(encoded.isfinite().all()), "a drawn weight is not finite"
        encoding.append(memory("VmHWM") - before)
found = {"after_load": after_load - before, "loading": loading - before, "encoding": encoding}
print(json.dumps({**found, "own": memory("RssAnon") - own_before}), flush=True)
"""


@dataclass(frozen=True)
class KindMemory:
    """Bytes of a process's memory beyond what it had before the load, what is mapped from the file included.

    Attributes:
        after_load: when the model is loaded.
        loading: at most until then.
        encoding: at most in encodes of 32 tokens, and then of 512.
        own: in the end, what is not mapped from a file.
    """

    after_load: int
    loading: int
    encoding: tuple[int, int]
    own: int


@dataclass(frozen=True)
class KindLoad:
    """One kind.

    Attributes:
        file: its bytes.
        seconds: from the begin of the load to the first embedding, of 32 tokens, when all is imported.
        ratio: to the same of the file in bfloat16, loaded just before: median, least and largest of the pairs.
        memory: None where the system does not tell it.
        by: what computes.
    """

    kind: str
    file: int
    seconds: Spread
    ratio: Spread
    memory: KindMemory | None
    by: str

    @property
    def holds(self) -> bool | None:
        """Whether the memory after the load and in encodes is within the limit; None where it is not known."""
        if self.memory is None:
            return None
        return max(self.memory.after_load, *self.memory.encoding) <= MEMORY_FACTOR * self.file

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}


def measure_kind_loading(
    config: T5Config,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 5,
    kinds: Sequence[str] | None = None,
    threads: int | None = None,
    products: ProductsChoice = "auto",
    progress: Callable[[str], None] = lambda _: None,
) -> list[KindLoad]:
    """Writes a file of each kind to a temporary folder, loads it in fresh processes on the CPU, and deletes it.

    Weights are drawn: of a kind, load and memory depend on its layout alone. Before every load of a file, the same
    encoder's in bfloat16 is loaded. Each is read before, so that it is in the system's cache.

    Args:
        dtype: what is computed in.
        kinds: of :data:`nai_t5_core.bench.kinds_files.FILE_KINDS`; all of them if None.
        products: see :func:`nai_t5_core.backends.choose.prepack`; kinds that the kernels do not read are computed by
            torch whatever is named.

    Raises:
        ValueError: an unknown kind, one that the size's rows are no whole blocks of, fewer than one repeat, or what
            :func:`nai_t5_core.bench.kinds_files.write_kind` raises.
        RuntimeError: a child process failed; the message has the end of its output.
    """
    chosen = FILE_KINDS if kinds is None else tuple(kinds)
    refuse_files(chosen, config)
    if repeats < 1:
        raise ValueError(f"repeats={repeats}; at least 1 round must count")
    ids = torch.randint(3, config.vocab_size, (32,), generator=torch.Generator().manual_seed(0))
    common = {"threads": threads, "ids": ids.tolist(), "dtype": str(dtype).removeprefix("torch."), "prompts": _PROMPTS}
    common |= {"clear": _CLEAR}
    rows, plain_loads = [], list[_Load]()
    with tempfile.TemporaryDirectory(prefix="nai-t5-bench-") as name:
        folder = Path(name)
        progress(f"writing the file in {PLAIN}")
        plain = {**common, "products": products, "source": str(write_kind(PLAIN, folder, config))}
        for kind in chosen:
            progress(f"{kind}: writing the file")
            path = write_kind(kind, folder, config)
            arguments = {**common, "products": _products(path, products), "source": str(path)}
            pairs = []
            for number in range(repeats):
                progress(f"{kind}: load {number + 1} of {repeats}")
                pairs.append((_load(plain), _load(arguments)))
            plain_loads += [other for other, _ in pairs]
            progress(f"{kind}: memory")
            rows.append(_row(kind, arguments, pairs))
            path.unlink()
        progress(f"{PLAIN}: memory")
        rows.insert(0, _row(PLAIN, plain, [(load, load) for load in plain_loads]))
    return rows


def _products(path: Path, named: ProductsChoice) -> ProductsChoice:
    """What can be named for a file: nothing where the kernels do not read its kind."""
    return named if all(is_read(stored.kind) for stored in examine(path).quantised.values()) else "auto"


class _Load(NamedTuple):
    """A load up to the first embedding, and what computed it."""

    seconds: float
    by: str


def _load(arguments: dict[str, Any]) -> _Load:
    _read_through(Path(arguments["source"]))
    found = run_child(START + _OWN + _TIMED, arguments)
    return _Load(found["load"] + found["first"], found["by"])


def _read_through(path: Path) -> None:
    """The system may have taken a file out of its cache meanwhile, and the disk is not to be measured."""
    with path.open("rb", buffering=0) as file:
        while file.read(_READ_AT_ONCE):
            pass


def _row(kind: str, arguments: dict[str, Any], pairs: Sequence[tuple[_Load, _Load]]) -> KindLoad:
    """Of loads in pairs with those of the file in bfloat16, which come first."""
    ratios = [mine.seconds / other.seconds for other, mine in pairs]
    return KindLoad(
        kind,
        file=Path(arguments["source"]).stat().st_size,
        seconds=Spread.of([mine.seconds for _, mine in pairs]),
        ratio=Spread.of(ratios),
        memory=_memory(arguments) if _is_told() else None,
        by=pairs[0][1].by,
    )


def _is_told() -> bool:
    """Whether this system tells a process how much memory it has had at most, and forgets it when asked."""
    try:
        Path(_CLEAR).write_text("5")
    except OSError:
        return False
    return True


def _memory(arguments: dict[str, Any]) -> KindMemory:
    found = run_child(START + _OWN + _WEIGHED, arguments)
    short, long = found["encoding"]
    return KindMemory(found["after_load"], found["loading"], (short, long), found["own"])


def loading_table(rows: Sequence[KindLoad]) -> tuple[Table, list[str]]:
    """Medians, memory as multiples of the file, and what computes which kinds."""
    headings = (
        *("kind", "file", "to the first embedding", f"÷ {PLAIN}'s", "memory after the load", "while loading"),
        *(f"encoding {count} tokens" for count in _PROMPTS),
        *("of it not mapped", f"≤ {MEMORY_FACTOR}"),
    )
    cells = [
        (
            row.kind,
            f"{row.file / 1e9:.3f} GB",
            f"{row.seconds.median:.2f} s",
            f"{row.ratio.median:.2f}",
            *_of_memory(row),
        )
        for row in rows
    ]
    ways = dict.fromkeys(row.by for row in rows)
    notes = [f"by {by}: {', '.join(row.kind for row in rows if row.by == by)}" for by in ways]
    return Table("Files of each kind: load, and a process's memory as multiples of the file", headings, cells), notes


def _of_memory(row: KindLoad) -> tuple[str, ...]:
    if row.memory is None:
        return ("",) * (len(_PROMPTS) + 4)
    found = row.memory
    parts = (f"{each / row.file:.2f}" for each in (found.after_load, found.loading, *found.encoding, found.own))
    return (*parts, "yes" if row.holds else "NO")
