"""pyarrow, which caption sets need and the rest of the package does not."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class MissingPackageError(ValueError):
    """An optional package is not installed; the message names the extra that installs it."""


def arrow(module: str = "") -> Any:
    """pyarrow, or one of its modules such as ``"parquet"``.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return import_module(f"pyarrow.{module}" if module else "pyarrow")
    except ImportError as error:
        raise MissingPackageError(
            f'caption sets need pyarrow, which cannot be imported ({error}); pip install "comfy-nai-t5[datasets]"'
        ) from error
