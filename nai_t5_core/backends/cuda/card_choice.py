"""What the kernels for CUDA do on a card: by what was measured on it, or by a table of architectures."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from nai_t5_core.backends.cuda.attention_shapes import B200, H200, RDNA3, USUAL, AttentionShape, AttentionShapes
from nai_t5_core.backends.cuda.card import Card
from nai_t5_core.backends.cuda.device_refusals import missing_to_overlap
from nai_t5_core.backends.cuda.measured_card import NEVER, MeasuredCard, MeasuredInt8, MeasuredProduct, read_measured
from nai_t5_core.model.attention_choice import FLEX_FROM_LENGTHS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        card: a card of this architecture.
        measured_on: the card that products were measured on; None of an estimate.
        products: ``"few rows"`` takes our kernel for products of few rows as it was measured, ``"torch"`` takes none.
        attention: how attention is divided; measured on an H200, and an estimate on other cards.
        overlapping_rows: up to how many rows launches overlap.
        int8_inputs_from: see :attr:`Choice.int8_inputs_from`.
    """

    card: str
    measured_on: str | None = None
    products: Literal["torch", "few rows"] = "torch"
    attention: AttentionShapes = USUAL
    overlapping_rows: int = 0
    int8_inputs_from: int | None = None


# Where nothing was measured, products are those of the card's maker, which torch takes.
TABLE: Mapping[str, Row] = {
    "sm_80": Row("A100"),
    "sm_86": Row("RTX 30"),
    "sm_89": Row("RTX 40, L40"),
    "sm_90": Row(
        "H100, H200",
        measured_on="an H200",
        products="few rows",
        attention=H200,
        overlapping_rows=64,
        int8_inputs_from=256,
    ),
    "sm_100": Row("B200", attention=B200),
    "sm_120": Row("RTX 50"),
    "gfx90a": Row("MI200"),
    "gfx942": Row("MI300"),
    "gfx1100": Row("RX 7900", attention=RDNA3),
}
_OTHER = Row("another card")

# The size of the heads that attention is measured with.
MEASURED_HEADS = 64


@dataclass(frozen=True)
class Choice:
    """What is done on a card.

    Attributes:
        row: of the table.
        measured: what was measured on this very card; None where nothing was.
    """

    card: Card
    row: Row
    measured: MeasuredCard | None = None

    @property
    def origin(self) -> str:
        """Where the choice comes from, in words."""
        if self.measured is not None:
            return "as measured on this card"
        if self.row.measured_on is not None:
            return f"as measured on {self.row.measured_on}; nai-t5 doctor measures this card"
        return f"an estimate for {self.card.architecture}; nai-t5 doctor measures this card"

    @property
    def rounding(self) -> str:
        """Which products round, in words, for the key of kept embeddings."""
        return self.row.products if self.measured is None else f"measured: {self.measured.rounding}"

    def attention_for(self, d_kv: int) -> AttentionShapes:
        """How attention over heads of this size is divided; measured with heads of 64, larger ones may not fit."""
        if self.measured is None or not self.measured.attention or d_kv > MEASURED_HEADS:
            return self.row.attention
        shapes = {
            each.tokens: AttentionShape(each.queries, each.keys, each.warps, each.stages)
            for each in self.measured.attention
        }
        return AttentionShapes(tuple(sorted(shapes.items())), shapes[max(shapes)])

    @property
    def overlapping_rows(self) -> int:
        """Up to how many rows launches overlap, where card, Triton and driver can have that."""
        known = self.row.overlapping_rows if self.measured is None else self.measured.overlapping_rows
        return self._where_possible(known)

    @property
    def int8_overlapping_rows(self) -> int:
        """The same, of layers whose weights and inputs are in int8."""
        return 0 if self._int8 is None else self._where_possible(self._int8.overlapping_rows)

    def _where_possible(self, overlapping_rows: int) -> int:
        is_possible = overlapping_rows and self.card.can_overlap and not missing_to_overlap()
        return overlapping_rows if is_possible else 0

    @property
    def flex_from_lengths(self) -> int:
        """See :data:`nai_t5_core.model.attention_choice.FLEX_FROM_LENGTHS`."""
        return FLEX_FROM_LENGTHS if self.measured is None else self.measured.flex_from_lengths or FLEX_FROM_LENGTHS

    @property
    def int8_inputs_from(self) -> int | None:
        """From how many tokens on inputs are in 8 bits too, where ``quantize="int8"`` made the weights; None: never."""
        found = self.row.int8_inputs_from if self._int8 is None else self._int8.inputs_from
        return None if found == NEVER else found

    @property
    def int8_products(self) -> tuple[MeasuredProduct, ...]:
        """The fastest products of few rows of int8 with int8; none where they were not measured."""
        return () if self._int8 is None else self._int8.products

    @property
    def _int8(self) -> MeasuredInt8 | None:
        return None if self.measured is None else self.measured.int8

    @property
    def unproven(self) -> str | None:
        """Why an automatic choice leaves the kernels alone on this card, as a sentence; None where it takes them."""
        if not self.card.is_amd or self.measured is not None:
            return None
        return (
            f"they compile for {self.card.architecture} and were never run on AMD's cards; nai-t5 doctor tries them, "
            "and if its results are right they are used from then on; or name products='torch' or 'triton'"
        )


@lru_cache
def choice_for(card: Card) -> Choice:
    """The choice for a card, the same for as long as the process runs: what it computes is known by it."""
    found = Choice(card, TABLE.get(card.architecture, _OTHER), read_measured(card))
    log.info("the kernels for CUDA on %s: products and attention %s", card.name, found.origin)
    return found
