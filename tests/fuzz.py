"""Damages a small file of every kind in thousands of ways, and counts what its reader makes of that.

``python tests/fuzz.py --examples 10000`` runs that many in all and prints a table; ``--reader`` takes one kind. A
reader returns, or raises a ValueError or an OSError, within 2 seconds and 200 MB. Anything else is undocumented: the
smallest such file of each outcome is kept in ``--keep``, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from hypothesis import HealthCheck, Phase, given, settings

# The checkout that this file is in, whichever is installed.
sys.path.insert(0, str(Path(__file__).parent.parent))

from fuzz_readers import Reader, readers

SECONDS, MEGABYTES = 2.0, 200
DOCUMENTED = (ValueError, OSError)


class TooLongError(BaseException):
    """No Exception, so that nothing on the way takes it for one of a reader."""


@dataclass
class Outcomes:
    """What a reader made of its inputs."""

    inputs: int = 0
    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    undocumented: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: float = 0.0

    def add(self, content: bytes, name: str | None, seconds: float) -> None:
        self.inputs += 1
        self.seconds += seconds
        self.slowest = max(self.slowest, seconds)
        if name is None:
            self.read += 1
        elif name.startswith("!"):
            known = self.undocumented.get(name)
            self.undocumented[name] = content if known is None or len(content) < len(known) else known
        else:
            self.refused[name] += 1


def outcome(reader: Reader, folder: Path) -> str | None:
    """None where the reader returns; else its error's name, with a mark where the error is none of the family."""
    try:
        reader.read(folder)
    except DOCUMENTED as error:
        return type(error).__name__
    except KeyboardInterrupt:
        raise
    except MemoryError as error:
        traceback.clear_frames(error.__traceback__)  # which hold what has filled the memory
        return "! MemoryError"
    except BaseException as error:
        return f"! {type(error).__name__}: {str(error)[:120]}"
    return None


def fuzz(reader: Reader, examples: int, derandomize: bool, last: Path) -> Outcomes:
    """Runs a reader on damaged files; ``last`` holds the present one, for the case that the program crashes."""
    outcomes = Outcomes()

    # Failures are counted and not raised, so there is nothing to shrink.
    @settings(
        max_examples=examples,
        derandomize=derandomize,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(reader.damage(reader.content))
    def run(content: bytes) -> None:
        folder = last / "input"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        reader.write(folder, content)
        began, used = time.perf_counter(), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with bounded_memory():
                name = outcome(reader, folder)
        except TooLongError:  # while another error was handled
            name = "! TooLongError"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        used = time.process_time() - used
        if used > SECONDS:
            name = f"! {used:.1f} s"
        outcomes.add(content, name, time.perf_counter() - began)

    run()
    return outcomes


@contextmanager
def bounded_memory() -> Iterator[None]:
    """What is held now and so much more; what hypothesis remembers of a long run counts for no reader."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEGABYTES * 1_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000, help="in all")
    parser.add_argument("--reader", help="a part of the name of the only ones to run")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="where undocumented inputs go")
    parser.add_argument("--same", action="store_true", help="the same inputs in every run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _too_long)
    with tempfile.TemporaryDirectory() as last:
        chosen = {name: reader for name, reader in readers().items() if (options.reader or "") in name}
        # Whole files are read, which imports everything, before time and memory are bounded.
        for name, reader in chosen.items():
            (Path(last) / name).mkdir()
            reader.write(Path(last) / name, reader.content)
            reader.read(Path(last) / name)
        each = max(1, options.examples // len(chosen))
        table = {name: fuzz(reader, each, options.same, Path(last)) for name, reader in chosen.items()}
    _keep(table, chosen, options.keep)
    print(json.dumps({name: _summary(found) for name, found in table.items()}) if options.json else _text(table))
    return int(any(found.undocumented for found in table.values()))


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLongError(f"{SECONDS} s")


def _keep(table: dict[str, Outcomes], chosen: dict[str, Reader], folder: Path) -> None:
    for name, found in table.items():
        for number, content in enumerate(found.undocumented.values()):
            place = folder / name / str(number)
            place.mkdir(parents=True, exist_ok=True)
            chosen[name].write(place, content)


def _summary(found: Outcomes) -> dict[str, object]:
    return {**vars(found), "undocumented": list(found.undocumented)}


def _text(table: dict[str, Outcomes]) -> str:
    rows = [("reader", "inputs", "read", "refused", "undocumented", "mean ms", "slowest ms")]
    for name, found in table.items():
        refused = sum(found.refused.values())
        mean = f"{1000 * found.seconds / found.inputs:.1f}"
        numbers = (found.inputs, found.read, refused, len(found.undocumented), mean, f"{1000 * found.slowest:.0f}")
        rows.append((name, *map(str, numbers)))
    sums = [sum(int(row[column]) for row in rows[1:]) for column in range(1, 5)]
    rows.append(("all", *map(str, sums), "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    faults = [f"{name}: {fault}" for name, found in table.items() for fault in found.undocumented]
    return "\n".join(lines + faults)


if __name__ == "__main__":
    sys.exit(main())
