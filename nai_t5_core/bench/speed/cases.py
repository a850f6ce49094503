"""The batches that are timed; they vary length, padding and batch size one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nai_t5_core.model.packing import PaddingPolicy

NO_CASES = "none"


@dataclass(frozen=True)
class Case:
    """One batch to encode: ``prompt_lengths`` real tokens each, padded to ``length``.

    ``padding`` is our padding policy; None gives all implementations the batch without a mask. ``slug`` is the case's
    name on the command line.
    """

    slug: str
    name: str
    prompt_lengths: tuple[int, ...]
    length: int
    padding: PaddingPolicy | None

    @property
    def real_tokens(self) -> int:
        return sum(self.prompt_lengths)

    @property
    def computed_tokens(self) -> int:
        """Rows that our encoder computes; pad rows count only where the policy has them computed."""
        return self.real_tokens if self.padding in ("skip", "trim") else len(self.prompt_lengths) * self.length


CASES = (
    Case("padded", "32 tokens padded to 512, masked", (32,), 512, "skip"),
    Case("batch-4", "12, 77, 30 and 45 tokens padded to 512, masked", (12, 77, 30, 45), 512, "skip"),
    Case(
        "batch-8",
        "8 prompts of 5 to 120 tokens padded to 512, masked",
        (5, 22, 38, 55, 71, 87, 104, 120),
        512,
        "skip",
    ),
    Case("32", "32 tokens", (32,), 32, None),
    Case("128", "128 tokens", (128,), 128, None),
    Case("512", "512 tokens", (512,), 512, None),
    Case("padded-exact", "32 tokens padded to 512, masked, pad rows kept", (32,), 512, "exact"),
)


def cases_named(slugs: Sequence[str]) -> tuple[Case, ...]:
    """Cases by their slugs, in the given order; ``("none",)`` gives none.

    Raises:
        ValueError: an unknown slug.
    """
    if tuple(slugs) == (NO_CASES,):
        return ()
    known = {case.slug: case for case in CASES}
    if unknown := [slug for slug in slugs if slug not in known]:
        raise ValueError(f"unknown cases {unknown}; allowed: {', '.join(known)}, or {NO_CASES} alone")
    return tuple(known[slug] for slug in slugs)
