"""What ``nai-t5 doctor`` measured on a card, in a small file that ``auto`` reads."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from nai_t5_core.backends.cuda.card import Card
from nai_t5_core.facts.paths import cache_folder

log = logging.getLogger(__name__)

# What packages with Triton are called: for CUDA, for ROCm, and for Windows.
_TRITONS = ("triton", "pytorch-triton-rocm", "triton-windows")
# The weights that the tables of this version choose for; a file may have products of others, which are passed over.
PLAIN_WEIGHTS, INT8_WEIGHTS = "16 bit", "int8"

# A product by torch, by our kernel for few rows, or by our kernel in tiles. Later versions may know more.
TORCH, FEW_ROWS, TILES = "torch", "few rows", "tiles"


# In place of a number from which on something is faster, where it never is.
NEVER = 1 << 30

# What a configuration has to say, by the way.
_FIELDS = {
    FEW_ROWS: {"block_columns", "block_depth", "parts", "stages", "warps"},
    TILES: {"block_rows", "block_columns", "block_depth", "parts", "stages", "warps"},
}
_MOST = 256
# What Triton's products of tiles are at least.
_LEAST_BLOCK = 16


def _power_of_two(number: int) -> int:
    if number & (number - 1):
        raise ValueError(f"{number} is no power of two")
    return number


PowerOfTwo = Annotated[int, Field(gt=0, le=_MOST), AfterValidator(_power_of_two)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MeasuredProduct(_Part):
    """The fastest way to compute a kind of product of up to ``rows`` rows.

    Attributes:
        kind: see :data:`nai_t5_core.backends.cuda.products.Kind`.
        weights: how they lie in memory.
        way: what computes it.
        configuration: the fields of its configuration or tile.
        microseconds: of all products of this kind in a layer of a T5-XXL; ``by_torch`` those by torch.
    """

    kind: str
    rows: int = Field(gt=0)
    weights: str = PLAIN_WEIGHTS
    way: str
    configuration: dict[str, Annotated[int, Field(gt=0, le=_MOST)]] = {}
    microseconds: float = Field(gt=0)
    by_torch: float = Field(gt=0)

    @model_validator(mode="after")
    def _says_all(self) -> MeasuredProduct:
        if (needed := _FIELDS.get(self.way)) is not None and self.configuration.keys() != needed:
            raise ValueError(
                f"{self.way} needs {', '.join(sorted(needed))}; got {', '.join(sorted(self.configuration))}"
            )
        for name, number in self.configuration.items():
            if name.startswith("block_") or name == "warps":
                _power_of_two(number)
            if name.startswith("block_") and number < _LEAST_BLOCK:
                raise ValueError(f"{name} is {number}; at least {_LEAST_BLOCK} is needed")
        parts = self.configuration.get("parts", 1)
        if needed is not None and parts > 1 and self.kind != "summed":
            raise ValueError(f"{parts} parts of a {self.kind} product; only summed ones are added up later")
        return self


class MeasuredAttention(_Part):
    """The fastest shape of attention for a packed row of up to ``tokens`` tokens, see
    :class:`nai_t5_core.backends.cuda.attention_shapes.AttentionShape`.
    """

    tokens: int = Field(gt=0)
    queries: PowerOfTwo = Field(ge=16, le=128)
    keys: PowerOfTwo = Field(ge=16, le=128)
    warps: PowerOfTwo = Field(le=16)
    stages: int = Field(gt=0, le=8)
    microseconds: float = Field(gt=0)


class MeasuredInt8(_Part):
    """What suits ``quantize="int8"``, whose inputs may be in 8 bits too.

    Attributes:
        products: the fastest of int8 with int8, of few rows.
        inputs_from: from how many tokens on inputs in 8 bits too are faster; :data:`NEVER` where they are not.
        overlapping_rows: up to how many rows such layers are faster where launches overlap; 0 where they are not.
    """

    products: tuple[MeasuredProduct, ...] = ()
    inputs_from: int = Field(gt=0)
    overlapping_rows: int = Field(default=0, ge=0)


class MeasuredCard(_Part):
    """All that was measured, and with what.

    Attributes:
        overlapping_rows: up to how many rows layers are faster where launches overlap; 0 where they are not.
        flex_from_lengths: from how many lengths in a batch on flex is faster than SDPA; None where it was not measured.
        int8: of weights that ``quantize="int8"`` makes; None where it was not measured.
    """

    format: Literal[2] = 2
    card: str
    architecture: str
    torch: str
    triton: str
    kernels: str
    products: tuple[MeasuredProduct, ...]
    attention: tuple[MeasuredAttention, ...]
    overlapping_rows: int = Field(default=0, ge=0)
    flex_from_lengths: int | None = Field(default=None, gt=0)
    int8: MeasuredInt8 | None = None

    @classmethod
    def of(
        cls, card: Card, products: Sequence[MeasuredProduct], attention: Sequence[MeasuredAttention]
    ) -> MeasuredCard:
        """What was measured on a card now, with these versions."""
        return cls(
            card=card.name,
            architecture=card.architecture,
            torch=versions()["torch"],
            triton=versions()["triton"],
            kernels=versions()["kernels"],
            products=tuple(products),
            attention=tuple(attention),
        )

    @property
    def rounding(self) -> str:
        """Which ways round, in words: two cards with the same round in the same places."""
        known = (each for each in self.products if each.weights == PLAIN_WEIGHTS and each.way != TORCH)
        told = sorted((each.kind, each.rows, each.way) for each in known)
        return ", ".join(f"{kind} {rows} {way}" for kind, rows, way in told) or TORCH


@cache
def versions() -> dict[str, str]:
    """What a measurement depends on beside the card: versions, and what our kernels are, by their sources."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return {
        "torch": torch.__version__,
        "triton": _version_of_triton(),
        "kernels": hashlib.sha256(sources).hexdigest()[:12],
    }


def measured_file(card: Card) -> Path:
    """Where the measurements of a card are, or will be."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{card.name} {card.architecture}".lower()).strip("-")
    return cache_folder() / "cards" / f"{name}.json"


def read_measured(card: Card) -> MeasuredCard | None:
    """What was measured on this card with these versions; None where nothing was.

    A file that is broken, or of another card or other versions, is passed over, and a warning says why, once.
    """
    path = measured_file(card)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        _pass_over(path, f"it cannot be read ({error})")
        return None
    try:
        measured = MeasuredCard.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        _pass_over(path, f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}")
        return None
    if (measured.card, measured.architecture) != (card.name, card.architecture):
        _pass_over(path, f"it is of a {measured.card}, {measured.architecture}")
        return None
    for name, now in versions().items():
        if (before := getattr(measured, name)) != now:
            _pass_over(path, f"they were made with {name} {before}, and this is {now}")
            return None
    return measured


@cache
def _pass_over(path: Path, reason: str) -> None:
    log.warning("the measurements in %s are passed over: %s; nai-t5 doctor measures anew", path, reason)


def _version_of_triton() -> str:
    """Read without importing it, which takes a second."""
    for package in _TRITONS:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"
