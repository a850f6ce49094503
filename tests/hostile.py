"""What tests of hostile files share: the bounds, and headers that say something else."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def in_little() -> Iterator[None]:
    """A second and 200 MB, of what this process itself takes; most of the time may be that of watching its memory."""
    began = time.process_time()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 1


def other_header(path: Path, **metadata: str) -> None:
    """Changes texts in the header of a safetensors file; None takes one away."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = {k: v for k, v in {**header["__metadata__"], **metadata}.items() if v is not None}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
