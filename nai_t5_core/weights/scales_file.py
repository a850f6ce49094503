"""Float16 scales in a small JSON file of their own, for checkpoints that shall not be written again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from nai_t5_core.facts.nested_text import parse_object
from nai_t5_core.facts.scales import StackScales
from nai_t5_core.weights.whole_files import replacing

# Where the decoder's scales are, beside the encoder's.
_DECODER = "decoder"


def read_scales(path: str | Path) -> StackScales:
    """The encoder's scales in a file that :func:`write_scales` made.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    scales, _ = _read(path)
    return scales


def read_decoder_scales(path: str | Path) -> StackScales | None:
    """The decoder's scales in such a file; None where there are none. Raises as :func:`read_scales` does."""
    _, scales = _read(path)
    return scales


def _read(path: str | Path) -> tuple[StackScales, StackScales | None]:
    try:
        values = parse_object(Path(path).read_bytes())
        decoder = values.get(_DECODER)
        return StackScales.from_values(values), None if decoder is None else StackScales.from_values(decoder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as float16 scales ({error}); give a file written by --save-scales or save_scales()"
        ) from error


def write_scales(path: str | Path, scales: StackScales, decoder_scales: StackScales | None = None) -> None:
    """Writes scales as JSON; the file appears when it is complete."""
    values = asdict(scales) | ({_DECODER: asdict(decoder_scales)} if decoder_scales else {})
    with replacing(Path(path)) as partial:
        partial.write_text(json.dumps(values) + "\n", encoding="utf-8")
