"""How attention is divided among programs, by the length of a packed row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionShape:
    """A program of attention: it computes ``queries`` queries of a head, and reads ``keys`` keys in each step."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class AttentionShapes:
    """The shapes by length: ``by_tokens`` has the longest packed row of each, in ascending order; then ``longer``."""

    by_tokens: tuple[tuple[int, AttentionShape], ...]
    longer: AttentionShape

    def __call__(self, tokens: int) -> AttentionShape:
        """The shape for a packed row of so many tokens."""
        return next((shape for most, shape in self.by_tokens if tokens <= most), self.longer)


# Few queries in short rows, so that all of the device has work. On an H200 these were the fastest for one prompt of 16
# to 1024 tokens.
H200 = AttentionShapes(((32, AttentionShape(16, 32)),), AttentionShape(64, 32))

# With 32 keys, 16 queries and heads of 128 registers are spilled on sm_80; with 64 an H200 takes a seventh longer.
USUAL = AttentionShapes(((32, AttentionShape(16, 64)),), H200.longer)

# With four warps and heads of 128 registers are spilled on sm_100.
B200 = AttentionShapes(USUAL.by_tokens, AttentionShape(64, 32, 8))

# Larger ones spill registers on gfx1100.
RDNA3 = AttentionShapes((), AttentionShape(16, 16))


# Cards whose programs may have more than 100 KB of shared memory.
_LARGE = ("sm_80", "sm_90", "sm_100")


def candidates(tokens: int, architecture: str = "sm_90") -> Iterator[AttentionShape]:
    """The shapes to try for a row of so many tokens; with heads of 64 none spills registers or lacks shared memory."""
    if architecture.startswith("gfx11"):
        yield AttentionShape(16, 16)
        yield AttentionShape(32, 16)
        yield AttentionShape(16, 32)
        return
    yield AttentionShape(16, 32)
    yield AttentionShape(16, 64)
    if tokens > 32:
        yield AttentionShape(64, 32)
    if tokens > 64 and architecture in (*_LARGE, "sm_86", "sm_89"):
        yield AttentionShape(64, 64)
    if tokens > 128 and architecture.startswith("sm_"):
        yield AttentionShape(128, 32, 8)
        yield AttentionShape(128, 64, 8)
        if architecture in _LARGE:
            yield AttentionShape(128, 64, 8, 3)
