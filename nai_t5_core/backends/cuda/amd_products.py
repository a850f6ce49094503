"""Configurations of our products of few rows that fit into the 64 KiB of AMD's cards, and spill no registers there."""

from __future__ import annotations

from nai_t5_core.backends.cuda.products import Configuration, Configurations

_SMALLEST = Configuration(16, 16, 1, 2)
_SMALL = Configuration(32, 32, stages=2)
_WIDE = Configuration(64, 64, stages=2)

# Estimates: they compile for gfx90a, gfx942 and gfx1100, and were never run.
AMD: Configurations = {
    **{("plain", rows): (_WIDE, _SMALL, _SMALLEST) for rows in (16, 32)},
    **{("gated", rows): (_SMALL, _SMALLEST) for rows in (16, 32, 64)},
    **{("summed", rows): (Configuration(64, 64, 4, 2), _WIDE, _SMALLEST) for rows in (16, 32)},
    **{("plain", rows): (_SMALL, _SMALLEST) for rows in (64, 128)},
    **{("summed", rows): (Configuration(32, 32, 4, 2), _SMALL, _SMALLEST) for rows in (64, 128)},
    ("gated", 128): (_SMALLEST,),
}
