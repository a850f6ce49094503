"""T5's denoising objective: spans of a text are taken out, and the model writes what was in them.

Of n tokens, round(n · density) are noise, in round(noise / mean span) spans between which there is text (Raffel et al.,
2020, section 3.1.4). In the inputs every span is one sentinel; the targets are the same sentinels, each followed by the
tokens it stands for. All places of the spans are equally likely. In the published code every text ends with a span,
which hardly matters in 512 tokens; but the only span of a short caption would always be its last words.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


def span_lengths(length: int, density: float, mean_span: float, random: np.random.Generator) -> tuple[Ids, Ids]:
    """Lengths of the kept pieces [spans + 1] and of the noise spans between them [spans].

    Only the first and the last piece can be empty; spans and the pieces between them have at least 1 token.

    Raises:
        ValueError: fewer than 2 tokens; one must be kept and one be noise.
    """
    if length < 2:
        raise ValueError(f"a text of {length} tokens cannot be corrupted; it needs 2 at least")
    noise = min(max(round(length * density), 1), length - 1)
    kept = length - noise
    spans = min(max(round(noise / mean_span), 1), noise, kept + 1)
    pieces = _composition(kept + 2, spans + 1, random)
    pieces[[0, -1]] -= 1
    return pieces, _composition(noise, spans, random)


def _composition(total: int, parts: int, random: np.random.Generator) -> Ids:
    """``total`` as an ordered sum of ``parts`` integers of at least 1; all such sums are equally likely."""
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [total]))).astype(np.int64)


def corrupt(
    tokens: Ids, sentinels: Ids, density: float, mean_span: float, random: np.random.Generator
) -> tuple[Ids, Ids]:
    """A text to inputs and targets, both without an end token.

    Args:
        tokens: [length] ids without an end token.
        sentinels: ids of the sentinels, in the order in which they are used.
        density: the share of tokens that are noise.
        mean_span: the mean length of a noise span.
        random: draws where the spans lie.

    Returns:
        Inputs [kept + spans] and targets [noise + spans].

    Raises:
        ValueError: fewer than 2 tokens, or more spans than there are sentinels.
    """
    kept, noise = span_lengths(len(tokens), density, mean_span, random)
    spans = len(noise)
    if spans > len(sentinels):
        raise ValueError(
            f"a text of {len(tokens)} tokens has {spans} noise spans, and the vocabulary {len(sentinels)} "
            "sentinels; use shorter texts (max_length) or longer spans (mean_span)"
        )
    # Kept pieces and noise spans alternate; the cumulative sum of their lengths gives their ends.
    lengths = np.zeros(2 * spans + 1, dtype=np.int64)
    lengths[0::2], lengths[1::2] = kept, noise
    pieces = np.split(tokens, np.cumsum(lengths)[:-1])
    marks = [*sentinels[:spans, None]]
    inputs = [part for pair in zip(pieces[0::2], [*marks, tokens[:0]], strict=True) for part in pair]
    targets = [part for pair in zip(marks, pieces[1::2], strict=True) for part in pair]
    return np.concatenate(inputs), np.concatenate(targets)
