"""Float16 scales in a small JSON file of their own, for checkpoints that shall not be written again."""

from __future__ import annotations

from pathlib import Path

from nai_t5_core.formats import replacing
from nai_t5_core.scales import StackScales


def read_scales(path: str | Path) -> StackScales:
    """The scales in a file that :func:`write_scales` made.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    try:
        return StackScales.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as float16 scales ({error}); give a file written by --save-scales or save_scales()"
        ) from error


def write_scales(path: str | Path, scales: StackScales) -> None:
    """Writes scales as JSON; the file appears when it is complete."""
    with replacing(Path(path)) as partial:
        partial.write_text(scales.to_json() + "\n", encoding="utf-8")
