"""Errors of the ``tokenizers`` library as errors of ours.

It raises plain Exceptions, and where its own code fails a PanicException, which is none: ``except Exception`` lets it
through, and a server ends with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_PANICS = "pyo3_runtime"


@contextmanager
def as_value_error(what: str) -> Iterator[None]:
    """Turns whatever the library raises into a ValueError that begins with ``what``."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {error}") from None
    except BaseException as error:
        if type(error).__module__ != _PANICS:
            raise
        raise ValueError(f"{what}: {error}") from None
